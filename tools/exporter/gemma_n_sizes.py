"""What the configuration of Gemma 3n and Gemma 4 says beyond that of other decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .text import ACTIVATIONS, Llama
from .weights import CheckpointError

KINDS = {"gemma3n_text", "gemma4_text"}
FULL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer; ``share`` of the pairs turn, the others stay."""

    theta: float
    factor: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class GemmaN(Llama):
    """A decoder with embeddings of its own for every layer.

    ``beside`` is their size, ``rows`` the number of tokens that have them.
    ``types`` says for each layer what it sees, ``head_sizes``, ``key_heads`` and
    ``inners`` its sizes; the last ``shared`` layers use keys and values of
    earlier ones. ``copies`` are the states side by side of Gemma 3n (0: one),
    ``rank`` the size of its shortcut, ``sparsity`` the share of the feed-forward
    part that is 0. ``softcap`` bounds the logits.
    """

    beside: int = 0
    rows: int = 0
    types: tuple[str, ...] = ()
    head_sizes: tuple[int, ...] = ()
    key_heads: tuple[int, ...] = ()
    inners: tuple[int, ...] = ()
    shared: int = 0
    same: bool = False
    copies: int = 0
    active: int = 0
    rank: int = 0
    sparsity: tuple[float, ...] = ()
    softcap: float = 0.0
    ropes: tuple[tuple[str, Rope], ...] = ()

    @property
    def standard(self) -> bool:
        return True

    @property
    def kv_bytes_per_token(self) -> int:
        own = self.layers - self.shared
        sizes = zip(self.key_heads[:own], self.head_sizes[:own], strict=True)
        return sum(2 * 4 * heads * size for heads, size in sizes)


def read(text: dict[str, Any]) -> GemmaN:
    """Read the sizes, with the defaults of transformers.

    Raises:
      CheckpointError: for mixtures of experts, and other kinds of positions.

    """
    four = text["model_type"] == "gemma4_text"
    if text.get("enable_moe_block"):
        raise CheckpointError("enable_moe_block: a mixture of experts is not known")
    if text.get("attention_bias") or text.get("use_bidirectional_attention") == "all":
        raise CheckpointError("attention_bias, use_bidirectional_attention: not known")
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    every = 6 if four else 5
    types = tuple(
        text.get("layer_types")
        or (FULL if (i + 1) % every == 0 else LOCAL for i in range(layers))
    )  # fmt: skip
    shared = int(text.get("num_kv_shared_layers", 0 if four else 15))
    if not 0 <= shared < layers or not set(types) <= set(types[: layers - shared]):
        raise CheckpointError("num_kv_shared_layers: a layer has nothing to share")
    head, key_heads = int(text.get("head_dim", 256)), int(text["num_key_value_heads"])
    sizes = _head_sizes(text, types, head) if four else (head,) * layers
    same = four and bool(text.get("attention_k_eq_v"))
    whole_heads = int(text.get("num_global_key_value_heads") or key_heads) if same else key_heads
    inner = text["intermediate_size"]
    inners = list(inner) if isinstance(inner, list) else [int(inner)] * layers
    if four and text.get("use_double_wide_mlp"):
        inners[layers - shared :] = [2 * size for size in inners[layers - shared :]]
    sparsity = text.get("activation_sparsity_pattern") or [0.0] * layers
    return GemmaN(
        hidden=int(text["hidden_size"]),
        inner=inners[0],
        layers=layers,
        heads=heads,
        kv_heads=key_heads,
        head=head,
        vocabulary=int(text["vocab_size"]),
        context=int(text.get("max_position_embeddings", 32768)),
        theta=0.0,
        epsilon=float(text.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[text.get("hidden_activation") or "gelu_pytorch_tanh"],
        windows=tuple(int(text.get("sliding_window", 512)) if t == LOCAL else 0 for t in types),
        scaling=1.0,
        beside=int(text.get("hidden_size_per_layer_input", 256)),
        rows=int(text.get("vocab_size_per_layer_input", 262144)),
        types=types,
        head_sizes=sizes,
        key_heads=tuple(whole_heads if t == FULL else key_heads for t in types),
        inners=tuple(inners),
        shared=shared,
        same=same,
        copies=0 if four else int(text.get("altup_num_inputs", 4)),
        active=0 if four else int(text.get("altup_active_idx", 0)),
        rank=0 if four else int(text.get("laurel_rank", 64)),
        sparsity=(0.0,) * layers if four else tuple(float(s) for s in sparsity),
        softcap=float(text.get("final_logit_softcapping") or 0.0),
        ropes=tuple(_ropes(text, four=four).items()),
    )


def _head_sizes(text: dict[str, Any], types: tuple[str, ...], head: int) -> tuple[int, ...]:
    """Layers that see everything have larger heads: one number, or one a layer (transformers 5)."""
    whole = int(text.get("global_head_dim", 512))
    each = text.get("per_layer_config") or {}
    return tuple(
        int(each.get(str(i), {}).get("head_dim", whole if t == FULL and not each else head))
        for i, t in enumerate(types)
    )


def _ropes(text: dict[str, Any], *, four: bool) -> dict[str, Rope]:
    found = {
        FULL: Rope(float(text.get("rope_theta", 1e6)), share=0.25 if four else 1.0),
        LOCAL: Rope(float(text.get("rope_local_base_freq", 1e4))),
    }
    for kind, rope in (text.get("rope_parameters") or {}).items():
        if rope is None or kind not in found:
            continue
        name = rope.get("rope_type", "default")
        if name not in {"default", "linear", "proportional"}:
            raise CheckpointError(f"rope_parameters: the kind {name!r} is not known")
        share = float(rope.get("partial_rotary_factor", 1.0)) if name == "proportional" else 1.0
        found[kind] = Rope(
            float(rope.get("rope_theta", found[kind].theta)), float(rope.get("factor", 1.0)), share
        )
    return found
