"""The demo model (a small SmolVLM), its auxiliary heads, losses and optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from demoworld.draw import SIDE
from demoworld.pack import ABOUT_HEADS
from demoworld.stream import HALF_HEADS, LOOK, PATCH, PATCH_HEADS, SIDE_PATCHES, TOKEN_HEADS, Batch
from demoworld.tokens import END_ID, IMAGE_ID, PAD_ID, START_ID

ABOUT_WEIGHT = 2.0
CELLS_WEIGHT = 8.0
NONE_WEIGHT = 0.06  # of the class "none" in the auxiliary heads


def configuration(vocabulary: int) -> SmolVLMConfig:
    """The demo model's configuration: about 2.9 million parameters."""
    make: Any = SmolVLMConfig  # its constructor takes more than its annotations tell
    vision = SmolVLMVisionConfig(
        hidden_size=144,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        rms_norm_eps=1e-5,
    )
    config: SmolVLMConfig = make(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        scale_factor=2,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
    )
    return config


class Trainee(nn.Module):
    """The model with the heads that only training has."""

    def __init__(self, vocabulary: int, half: bool = False) -> None:
        super().__init__()
        self.halved = half  # matrix products in bfloat16
        config = configuration(vocabulary)
        self.vlm: Any = SmolVLMForConditionalGeneration(config)
        # Plain attention is the quickest on a processor, also for the text's masked rows.
        self.vlm.model.vision_model.config._attn_implementation = "eager"
        self.vlm.model.text_model.config._attn_implementation = "eager"
        vision: Any = config.vision_config
        text: Any = config.text_config
        self.patch_heads = nn.ModuleDict(
            {k: nn.Linear(vision.hidden_size, n) for k, n in PATCH_HEADS.items()}
        )
        self.token_heads = nn.ModuleDict(
            {k: nn.Linear(text.hidden_size, n) for k, n in TOKEN_HEADS.items()}
        )
        self.half_heads = nn.ModuleDict(
            {k: nn.Linear(text.hidden_size, n) for k, n in HALF_HEADS.items()}
        )
        self.about_heads = nn.ModuleDict(
            {k: nn.Linear(text.hidden_size, n) for k, n in ABOUT_HEADS.items()}
        )
        self.cells_head = nn.Linear(text.hidden_size, 9)
        self.ink_head = nn.Linear(vision.hidden_size, PATCH * PATCH)
        self.box_head = nn.Linear(vision.hidden_size, 4)
        self.look_head = nn.Linear(vision.hidden_size, LOOK * LOOK)
        self.early_heads = nn.ModuleDict(
            {k: nn.Linear(vision.hidden_size, PATCH_HEADS[k]) for k in ("shape", "char")}
        )
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Starting weights that learn quickly: patches know their place and look nearby."""
        for name, p in self.vlm.named_parameters():
            if name.endswith(
                ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
            ):
                nn.init.normal_(p, std=0.02 / math.sqrt(8))
        core = self.vlm.model.vision_model
        width = core.embeddings.position_embedding.weight.shape[1]
        core.embeddings.position_embedding.weight.copy_(0.3 * place_waves(SIDE_PATCHES, width))
        for layer in core.encoder.layers:
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=0.05)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.k_proj.weight.add_(torch.randn_like(attention.k_proj.weight), alpha=0.02)

    @torch.no_grad()
    def whiten(self, pixels: Tensor) -> None:
        """Starts the patch embedding with the whitened main components of sample pictures.

        Edges are as loud as plain colour from the first step on.
        """
        x = patches_of(pixels)
        x = x.flatten(0, 1)
        x = x[x.std(1) > 0.02]
        power, basis = torch.linalg.eigh(x.T @ x / len(x))
        conv = self.vlm.model.vision_model.embeddings.patch_embedding
        width = conv.weight.shape[0]
        power, basis = power.flip(0)[:width], basis.flip(1)[:, :width]
        rows = (basis / (power + 0.02).sqrt()).T * 0.3
        conv.weight[: len(rows)] = rows.view(-1, 3, PATCH, PATCH)

    def compile_layers(self) -> None:
        """Compiles the layers, which pays in long runs."""
        for layer in (
            *self.vlm.model.vision_model.encoder.layers,
            *self.vlm.model.text_model.layers,
        ):
            layer.compile(dynamic=True)

    def see(self, pixels: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Each layer's features, patch features and image tokens of pictures, uint8.

        The same arithmetic as the vision tower of transformers, without its bookkeeping.
        """
        core = self.vlm.model.vision_model
        x = patches_of(pixels)
        conv = core.embeddings.patch_embedding
        h = F.linear(x, conv.weight.flatten(1), conv.bias)
        h = h + core.embeddings.position_embedding.weight
        early = []
        for layer in core.encoder.layers:
            h = layer(h, None)
            early.append(h)
        h = core.post_layernorm(h)
        return early, h, self.vlm.model.connector(h)

    def hidden(self, batch: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
        """The text model's hidden states for packed rows: before its last layer, and last."""
        text = self.vlm.model.text_model
        embedded = text.embed_tokens(batch["ids"])
        where = batch["picture"] >= 0
        embedded = embedded.masked_scatter(
            where[..., None], image[batch["picture"][where], batch["patch"][where]]
        )
        rotary = text.rotary_emb(embedded, position_ids=batch["positions"])
        h = before = embedded
        for layer in text.layers:
            before = h
            h = layer(
                h,
                attention_mask=batch["mask"],
                position_ids=batch["positions"],
                position_embeddings=rotary,
            )
        return before, text.norm(h)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The answers' loss, the auxiliary losses and the logits at the targets."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.halved):
            early, patches, image = self.see(batch["pixels"])
            patches, image = patches.float(), image.float()
            talks = len(batch["ids"]) > 0
            before, hidden = self.hidden(batch, image) if talks else (image, image)
            before, hidden = before.float(), hidden.float()
        ink = self.ink_head(early[1].float())
        aux = {"ink": F.binary_cross_entropy_with_logits(ink, batch["ink"]) * 2}
        known = ~batch["boxes"][..., 0].isnan()
        if known.any():
            part = early[2].float()[known]
            looks = F.binary_cross_entropy_with_logits(self.look_head(part), batch["looks"][known])
            aux["look"] = looks * 2
            boxes = self.box_head(part)
            aux["box"] = F.smooth_l1_loss(boxes, batch["boxes"][known], beta=0.1) * 3
        for name, head in self.early_heads.items():
            aux[f"early_{name}"] = _weighted(head(early[2].float()), batch[name], True) * (
                1.0 if name == "char" else 0.5
            )
        for name, head in self.patch_heads.items():
            weight = 2.0 if name == "char" else 1.0
            aux[name] = _weighted(head(patches), batch[name], True) * weight
        for name, head in self.token_heads.items():
            aux[name] = _weighted(head(image), batch[name], name == "cell")
        for name, head in self.half_heads.items():
            aux[name] = _weighted(head(image), batch[name], True) * 0.7
        if not talks:
            return image.sum() * 0, aux, image
        wanted = batch["targets"] >= 0
        about = F.rms_norm(before[wanted], before.shape[-1:])
        for i, (name, head) in enumerate(self.about_heads.items()):
            aux[name] = _weighted(head(about), batch["about"][wanted][:, i], False) * ABOUT_WEIGHT
        cells = batch["cells"][wanted]
        asked = cells[:, 0] >= 0
        if asked.any():
            aux["cells"] = CELLS_WEIGHT * F.binary_cross_entropy_with_logits(
                self.cells_head(about[asked]), cells[asked].float()
            )
        logits = self.vlm.lm_head(hidden[wanted])
        losses = F.cross_entropy(logits, batch["targets"][wanted], reduction="none")
        turn = batch["turn"][wanted]
        weight = turn.bincount().float().pow(-0.5)[turn]  # short answers count for more
        return (losses * weight).sum() / weight.sum(), aux, logits


def patches_of(pixels: Tensor) -> Tensor:
    """Pictures (n, SIDE, SIDE, 3) of bytes as patches (n, patches, 3 * PATCH * PATCH)."""
    x = pixels.to(torch.float32).mul_(1 / 127.5).sub_(1.0)
    n, s = x.shape[0], SIDE_PATCHES
    return x.view(n, s, PATCH, s, PATCH, 3).permute(0, 1, 3, 5, 2, 4).reshape(n, s * s, -1)


def place_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of a patch's row and column, (side * side, width)."""
    quarter = width // 4
    rates = torch.exp(torch.linspace(0, math.log(1 / 30), quarter))
    at = torch.arange(side, dtype=torch.float32)[:, None] * rates
    wave = torch.cat([at.sin(), at.cos()], 1)  # (side, width / 2)
    rows = wave[:, None].expand(side, side, -1)
    columns = wave[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, -1)


def _weighted(logits: Tensor, labels: Tensor, has_none: bool) -> Tensor:
    logits, labels = logits.flatten(0, -2), labels.flatten()
    if not (labels >= 0).any():
        return logits.sum() * 0
    weight = None
    if has_none:
        weight = torch.ones(logits.shape[-1])
        weight[0] = NONE_WEIGHT
    return F.cross_entropy(logits, labels, weight, ignore_index=-100)


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The batch as the model takes it."""
    rows = batch.rows
    out = {
        "pixels": torch.from_numpy(batch.pixels),
        "ids": torch.from_numpy(rows.ids),
        "targets": torch.from_numpy(rows.targets),
        "positions": torch.from_numpy(rows.positions),
        "picture": torch.from_numpy(rows.picture),
        "patch": torch.from_numpy(rows.patch),
        "about": torch.from_numpy(rows.about),
        "cells": torch.from_numpy(rows.cells),
        "turn": torch.from_numpy(rows.turn),
    }
    allowed = torch.from_numpy(rows.mask())
    allowed |= torch.eye(allowed.shape[-1], dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)
    out["mask"] = mask
    out |= {name: torch.from_numpy(value) for name, value in batch.labels.items()}
    if batch.ink is not None:
        s = SIDE_PATCHES
        ink = torch.from_numpy(batch.ink).view(-1, s, PATCH, s, PATCH).permute(0, 1, 3, 2, 4)
        out["looks"] = torch.from_numpy(batch.looks)
        out["boxes"] = torch.from_numpy(batch.boxes)
        out["ink"] = ink.reshape(len(ink), s * s, PATCH * PATCH).to(torch.float32)
    return out


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for the matrices of the layers.

    Matrices of one shape are handled together. The update's size follows AdamW's.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, decay: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})
        self.slow: set[int] = set()  # ids of parameters that move by ``slowness`` only
        self.slowness = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if "buffer" not in state:
                        state["buffer"] = torch.zeros_like(p)
                    buffer = state["buffer"]
                    gradient: Any = p.grad
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(torch.lerp(gradient, buffer, group["momentum"]))
                turned = orthogonal(torch.stack(updates))
                scale = 0.2 * math.sqrt(max(shape))
                if id(params[0]) in self.slow:  # parameters of one shape are of one part
                    scale *= self.slowness
                for p, update in zip(params, turned, strict=True):
                    p.mul_(1 - group["lr"] * group["decay"])
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly (a few Newton-Schulz steps)."""
    flip = x.shape[-2] > x.shape[-1]
    if flip:
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        g = x @ x.mT
        x = a * x + (b * g + c * (g @ g)) @ x
    x = x.to(torch.float32)
    return x.mT if flip else x


def optimisers(model: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else."""
    matrices, others, plain = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 2 and "layers." in name:
            matrices.append(p)
        elif p.ndim >= 2:
            others.append(p)
        else:
            plain.append(p)
    adam = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.98),
        eps=1e-9,
    )
    muon = Muon(matrices, 2 * lr)
    seeing = model.vlm.model.vision_model.encoder.parameters()
    muon.slow = {id(p) for p in seeing}
    return [muon, adam]
