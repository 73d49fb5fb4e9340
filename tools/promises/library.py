"""The libraries of the NPU, and what clients and owners give them."""

from __future__ import annotations

from tools.promises.change import Break

_PARTS = "tests/unit/test_rkllm_parts.py"
_DECODER = "tests/unit/test_rkllm_decoder.py"
_MARKS = "tests/process/test_npu_marks.py"
_PICTURES = "tests/unit/test_pictures_decode.py"
_CATALOGUE = "tests/unit/test_catalogue.py"

LIBRARY = (
    Break(
        "top_k fits 32 bits",
        "models/rkllm.py",
        "asked.top_k if 0 < asked.top_k < ALL_TOKENS else ALL_TOKENS",
        "asked.top_k or ALL_TOKENS",
        f"{_PARTS} {_DECODER} tests/process/test_npu_daemon.py",
    ),
    Break(
        "top_p does not become 0",
        "models/rkllm.py",
        "top_p=max(asked.top_p, LEAST)",
        "top_p=asked.top_p",
        _PARTS,
    ),
    Break(
        "a penalty does not become 0",
        "models/rkllm.py",
        "repetition_penalty=max(asked.repetition_penalty, LEAST)",
        "repetition_penalty=asked.repetition_penalty",
        _PARTS,
    ),
    Break(
        "a temperature that is nearly none is greedy",
        "models/rkllm.py",
        "asked.temperature if asked.temperature >= GREEDY_BELOW else 0.0",
        "asked.temperature",
        _PARTS,
    ),
    Break(
        "a penalty of nearly nothing leaves numbers",
        "engine/sampling.py",
        "repetition = max(repetition, LEAST)",
        "pass",
        "tests/unit/test_sampling.py",
    ),
    Break(
        "an answer's limit fits 32 bits",
        "engine/rkllm_decoder.py",
        "max_new_tokens=max(1, min(order.max_tokens, self._manifest.decoder.context))",
        "max_new_tokens=order.max_tokens",
        _DECODER,
    ),
    Break(
        "an adapter's scale fits float32",
        "models/checks.py",
        "if adapter.scale and not rkllm.LEAST <= abs(adapter.scale) <= MAX_SCALE",
        "if False",
        _PARTS,
    ),
    Break(
        "token ids fit 32 bits",
        "engine/rkllm_request.py",
        "if (ids != wide).any() or ids.min() < 0:",
        "if False:",
        "tests/unit/test_rkllm_more.py",
    ),
    Break(
        "a library need not say how much it holds",
        "engine/rkllm_decoder.py",
        "        except RuntimeError:\n            return order.count  # it does not say\n",
        "        except KeyError:\n            return order.count\n",
        _DECODER,
    ),
    Break(
        "a probe that kills is not repeated",
        "engine/rkllm_decoder.py",
        "            rkllm_probe.remember(state, key, rkllm_probe.Found(unfinished=True))\n",
        "",
        _MARKS,
    ),
    Break(
        "a probe that ends well is believed",
        "engine/rkllm_decoder.py",
        "            rkllm_probe.remember(state, key, found)\n",
        "",
        _MARKS,
    ),
    Break(
        "a saved prompt that kills is made anew",
        "engine/rkllm_prompts.py",
        '        mark.write_bytes(b"." * (deaths + 1))\n        _sync(mark)\n',
        "",
        _MARKS,
    ),
    Break(
        "saved prompts are given up where they kill twice",
        "engine/rkllm_prompts.py",
        "if deaths > 1:",
        "if deaths > 9:",
        _MARKS,
    ),
    Break(
        "a mark goes when the library has lived",
        "engine/rkllm_prompts.py",
        "        mark.unlink(missing_ok=True)\n",
        "",
        _MARKS,
    ),
    Break(
        "a transparent key has as many bits as its pixels",
        "engine/colours.py",
        "return (key & most) * step",
        "return key",
        _PICTURES,
    ),
    Break(
        "names that speak of another model are not overruled",
        "models/matching.py",
        "        if others:\n",
        "        if False:\n",
        f"{_CATALOGUE} tests/unit/test_ctl_import.py",
    ),
    Break(
        "stars of names do not cut words",
        "models/matching.py",
        'made += (r"(?![a-z0-9])" if part[-1:].isalnum() else "") + ".*"',
        'made += ".*"',
        _CATALOGUE,
    ),
    Break(
        "a number out of range is told the bound that it breaks",
        "wire/openai_fields.py",
        "low = value < least and least > -INT64",
        "low = least >= 0",
        "tests/unit/test_openai_parse.py",
    ),
)
