"""SLURM's reasons and states in plain words, with what to do about them. The standard library alone."""

from __future__ import annotations

import re

WAITING = {  # reason, as squeue gives it -> why a job is pending, and what to do
    "None": ("SLURM has not looked at it yet", ""),
    "Priority": ("jobs of higher priority come first", "wait; `sprio -j JOB` shows what the priority is made of"),
    "Resources": ("it is next in line, and waits for nodes to become free", "wait, or ask for less (--nodes, --time)"),
    "Dependency": ("it waits for the job before it to succeed", ""),
    "DependencyNeverSatisfied": ("the job before it did not succeed", "mend that one, then `resume`"),
    "BeginTime": ("it was requeued a moment ago, or is to begin later", "wait: after a requeue two minutes at most"),
    "JobHeldUser": ("it is held by its user", "scontrol release JOB"),
    "JobHeldAdmin": ("it is held by an administrator", "ask the site why"),
    "JobArrayTaskLimit": ("the array's limit of elements at a time (--jobs) is reached", "wait"),
    "JobLaunchFailure": (
        "SLURM could not start it on its nodes, and holds it",
        "scontrol release JOB, or tell the site",
    ),
    "ReqNodeNotAvail": (
        "nodes that it needs are down, drained or reserved",
        "`sinfo -R` shows why; leave --nodelist out, or wait for the end of a maintenance",
    ),
    "NodeDown": ("a node that it needs is down", "`sinfo -R` shows why; leave --nodelist out"),
    "Reservation": ("its reservation has not begun, or is full", "`scontrol show reservation`"),
    "PartitionDown": ("its partition is down", "ask the site, or choose another --partition"),
    "PartitionInactive": ("its partition takes no jobs now", "ask the site, or choose another --partition"),
    "PartitionNodeLimit": ("its partition never gives that many nodes", "fewer --nodes, or another --partition"),
    "PartitionTimeLimit": ("its time limit is above the partition's", "a shorter --time, or another --partition"),
    "PartitionConfig": (
        "no node of its partition can ever give what it asks for",
        "ask for less, or another --partition",
    ),
    "BadConstraints": ("no node has what its constraint names", "another --constraint"),
    "Licenses": ("it waits for a licence", "wait"),
    "InvalidAccount": ("its account is not valid", "another --account"),
    "InvalidQOS": ("its QOS is not valid", "another --qos"),
    "AccountNotAllowed": ("its account may not use this partition or QOS", "another --account or --partition"),
    "Prolog": ("its nodes are being prepared", "wait"),
    "Cleaning": ("what its last start left behind is being cleaned up", "wait"),
    "FrontEndDown": ("no front end can start it", "tell the site"),
}
LIMITS = (  # reasons that say which limit of an association or a QOS is reached
    (r"MaxJobs", "as many of its jobs run as its account or QOS allows", "wait for one of them to end"),
    (r"MaxSubmit", "as many of its jobs are queued as its account or QOS allows", "wait for one of them to end"),
    (
        r"MaxWall|MaxTimePerJob",
        "its time limit is above that of its account or QOS",
        "a shorter --time, or another --qos",
    ),
    (r"GrpTRESMinutes|GrpCPUMinutes|GrpGRESMinutes|MaxTRESMins", "the account has used up its hours", "ask for more"),
    (
        r"MaxTRESPerJob|MaxGRESPerJob|MaxNodePerJob|MaxCpuPerJob|MinTRES|MinCpu|MinGRES|MinMemory",
        "one job of its account or QOS may not ask for that much (or that little)",
        "other --nodes, or another --qos",
    ),
    (
        r"Grp|MaxTRES|MaxGRES|MaxNode|MaxCpu|MaxMem",
        "its account or QOS uses all it may at one time",
        "wait for its jobs to end",
    ),
)
ENDED = {  # state -> in words
    "BOOT_FAIL": "its nodes did not boot",
    "CANCELLED": "was cancelled",
    "COMPLETED": "finished",
    "DEADLINE": "was ended at its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "a node died",
    "OUT_OF_MEMORY": "was killed for want of memory: ask for more (--mem), or fewer data workers",
    "PREEMPTED": "was preempted",
    "REQUEUED": "was requeued",
    "TIMEOUT": "ended at its time limit",
}


def why_pending(reason: str) -> tuple[str, str]:
    """A reason of squeue's in words, and what to do ("": nothing); one that is not known stays as it is."""
    name = re.split(r"[\s,(:]", reason.strip("() "), maxsplit=1)[0]
    if reason.lower().startswith("launch failed"):
        name = "JobLaunchFailure"
    if name in WAITING:
        return WAITING[name]
    if name.startswith(("Assoc", "QOS", "Max")):
        for pattern, words, remedy in LIMITS:
            if re.search(pattern, name):
                return f"{words} ({name})", remedy
    return f"SLURM says {reason}", "`man squeue`, JOB REASON CODES"


def how_ended(state: str) -> str:
    """The last state of a job in words; `CANCELLED by 1000` names who did it."""
    name, _, who = state.partition(" by ")
    words = ENDED.get(name, name)
    return f"{words} by user {who}" if who else words


def duration(seconds: float) -> str:
    """29 d 4 h, 3 h 05 min, 12 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} d {hours} h"
