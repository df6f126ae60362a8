"""Where a run is to go, and which recipe it is by default there: from --cluster, --profile and what is on PATH."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch import scheduler
from launch.cluster_profile import (
    DEFAULT_PROFILE,
    VARIABLE,
    ClusterProfile,
    load_profile,
    named_profile,
    profile_overrides,
)
from vjepa.config import ConfigError

DEFAULT_RECIPE = "demo"
CLUSTER_RECIPE = "vit_gigantic"


@dataclass(frozen=True)
class Site:
    """Where a run is to go, and why there."""

    cluster: str  # local, slurm
    why: str
    profile_name: str = ""
    profile: ClusterProfile = field(default_factory=ClusterProfile)

    @property
    def is_slurm(self) -> bool:
        return self.cluster == "slurm"

    @property
    def world(self) -> int:
        """Ranks that batches are checked for; a local run is checked again by its processes."""
        return self.profile.world if self.is_slurm else 1


def choose_site(arguments: argparse.Namespace) -> Site:
    """This machine, or a cluster and what its profile and the flags say of it."""
    name, named_by = named_profile(arguments.profile)
    overrides = profile_overrides(arguments)
    if arguments.cluster == "slurm":
        why = "asked for; on this machine: --cluster local"
    elif arguments.cluster == "auto" and name is not None and scheduler.is_there():
        why = f"sbatch is on PATH and {named_by} names a cluster; on this machine: --cluster local"
    else:
        return Site("local", _why_local(arguments.cluster, name, overrides))
    if name is None:
        why += f"; no profile is named (--profile or ${VARIABLE})"
    name = name or DEFAULT_PROFILE
    return Site("slurm", why, Path(name).stem, load_profile(name, overrides))


def _why_local(asked: str, profile: str | None, overrides: Sequence[str]) -> str:
    """Why here; what only a cluster understands is refused."""
    if asked == "local":
        why = "asked for"
    elif not scheduler.is_there():
        why = "there is no sbatch on PATH"
    else:
        why = f"neither --profile nor ${VARIABLE} is set"
    if overrides:
        raise ConfigError(
            f"the run is for this machine ({why}), and {', '.join(overrides)} is for a cluster: leave it out, or say "
            "--cluster slurm"
        )
    ignored = f"; profile {profile} is not used" if profile is not None else ""
    return f"{why}{ignored}; on a cluster: --cluster slurm --profile NAME"


def choose_recipe(asked: str | None, site: Site) -> tuple[str, str]:
    """The recipe, and why it."""
    if asked is not None:
        return asked, "asked for"
    if site.profile.data:
        return CLUSTER_RECIPE, "the default where a cluster profile names data; another: --recipe demo"
    return DEFAULT_RECIPE, "the default where no cluster profile names data; another: --recipe vit_gigantic"
