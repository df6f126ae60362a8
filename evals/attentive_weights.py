"""Weights of attentive probes from and to others: the released ones, and `VJEPA2ForVideoClassification`.

Ours are named as in the reference code. The map to `transformers` (reference evaluation.md section 3), i counting
self-attention blocks, W weight or bias:

    pooler.query_tokens                       pooler.query_tokens
    pooler.blocks.i.norm1|norm2.W             pooler.self_attention_layers.i.layer_norm1|layer_norm2.W
    pooler.blocks.i.attn.qkv.W, rows q|k|v    pooler.self_attention_layers.i.self_attn.{q,k,v}_proj.W
    pooler.blocks.i.attn.proj.W               pooler.self_attention_layers.i.self_attn.out_proj.W
    pooler.blocks.i.mlp.fc1|fc2.W             pooler.self_attention_layers.i.mlp.fc1|fc2.W
    pooler.cross_attention_block.norm1|2.W    pooler.cross_attention_layer.layer_norm1|2.W
    pooler.cross_attention_block.xattn.q.W    pooler.cross_attention_layer.cross_attn.q_proj.W
    pooler.cross_attention_block.xattn.kv.W   pooler.cross_attention_layer.cross_attn.{k,v}_proj.W
    pooler.cross_attention_block.mlp.fc1|2.W  pooler.cross_attention_layer.mlp.fc1|2.W
    linear.W                                  classifier.W
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from evals.attentive import AttentiveClassifier, AttentiveConfig
from vjepa.hub import WeightsError, load_strict

_RENAMES = (  # ours -> transformers
    ("linear.", "classifier."),
    ("pooler.blocks.", "pooler.self_attention_layers."),
    ("pooler.cross_attention_block.", "pooler.cross_attention_layer."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.out_proj."),
    (".xattn.q.", ".cross_attn.q_proj."),
)
_FUSED = ((".attn.qkv.", ".self_attn.{}_proj.", "qkv"), (".xattn.kv.", ".cross_attn.{}_proj.", "kv"))


def to_transformers(head: AttentiveClassifier) -> dict[str, Tensor]:
    """The head's weights under the names that `VJEPA2ForVideoClassification` has beside its encoder (`vjepa2.`)."""
    state = {}
    for name, value in head.state_dict().items():
        renamed = _rename(name)
        for ours, theirs, letters in _FUSED:
            if ours in renamed:
                parts = value.chunk(len(letters))
                state |= {renamed.replace(ours, theirs.format(k)): v for k, v in zip(letters, parts, strict=True)}
                break
        else:
            state[renamed] = value
    return state


def from_transformers(
    state: Mapping[str, Tensor], *, num_heads: int, config: AttentiveConfig | None = None
) -> AttentiveClassifier:
    """The head in the weights of a `VJEPA2ForVideoClassification`; what is the encoder's (`vjepa2.`) is left out.

    `num_heads` is the encoder's there, and cannot be read off the weights. The LayerNorms' eps is 1e-6 unless a config
    says otherwise. Raises WeightsError where names or shapes do not fit.
    """
    state = {name: value for name, value in state.items() if not name.startswith("vjepa2.")}
    if "pooler.query_tokens" not in state or "classifier.weight" not in state:
        raise WeightsError(f"no attentive probe of transformers: it has {sorted(state)[:5]}")
    config = config or AttentiveConfig(num_heads=num_heads, eps=1e-6)
    depth = 1 + len({m[1] for name in state if (m := re.match(r"pooler\.self_attention_layers\.(\d+)\.", name))})
    if (config.depth, config.num_heads) != (depth, num_heads):
        raise WeightsError(f"the weights are a probe of depth {depth}, {num_heads} heads; the config says {config}")
    num_classes, dim = state["classifier.weight"].shape
    head = AttentiveClassifier(dim, num_classes, config)
    load_strict(head, _fuse(state, head), source="a transformers probe")
    return head


def _fuse(state: Mapping[str, Tensor], head: AttentiveClassifier) -> dict[str, Tensor]:
    """The weights under our names, q, k and v one matrix again."""
    found, used = {}, set()
    for name in head.state_dict():
        renamed = _rename(name)
        sources = [renamed]
        for ours, theirs, letters in _FUSED:
            if ours in renamed:
                sources = [renamed.replace(ours, theirs.format(letter)) for letter in letters]
        used.update(sources)
        if all(source in state for source in sources):
            found[name] = torch.cat([state[source] for source in sources]) if len(sources) > 1 else state[sources[0]]
    return found | {name: value for name, value in state.items() if name not in used}


def _rename(name: str) -> str:
    for ours, theirs in _RENAMES:
        name = name.replace(ours, theirs)
    return name


def from_official(path: Path | str, *, num_heads: int = 16, index: int = 0) -> AttentiveClassifier:
    """Classifier `index` of a released V-JEPA 2 probe checkpoint (an entry `classifiers`, a list of weights)."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "classifiers" not in checkpoint:
        raise WeightsError(f"{path} is no released probe: it has no entry 'classifiers'")
    classifiers = checkpoint["classifiers"]
    if not 0 <= index < len(classifiers):
        raise WeightsError(f"{path} holds {len(classifiers)} classifiers, there is no index {index}")
    state = {name.removeprefix("module."): value.float() for name, value in classifiers[index].items()}
    if "linear.weight" not in state:
        raise WeightsError(f"{path}[classifiers][{index}]: no linear.weight; it has {sorted(state)[:5]}")
    num_classes, dim = state["linear.weight"].shape
    depth = 1 + len({m[1] for name in state if (m := re.match(r"pooler\.blocks\.(\d+)\.", name))})
    head = AttentiveClassifier(dim, num_classes, AttentiveConfig(depth=depth, num_heads=num_heads))
    load_strict(head, state, source=f"{path}[classifiers][{index}]")
    return head
