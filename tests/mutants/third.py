"""A third round of mistakes, made up from the code alone after the second: what share of them the
suite noticed at once.
"""

from __future__ import annotations

THIRD: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "ras/plan.py": (
        "ras_plan",
        [
            ("range(start + 1, end + 1, 2)", "range(start + 1, end, 2)"),
        ],
    ),
    "ras/config.py": (
        "ras_plan ras_select examples",
        [
            ("steps(self.start, 1)", "steps(self.start, 0)"),
        ],
    ),
    "ras/run.py": (
        "ras_run ras_upstream flow ras_sampling edit",
        [
            (
                "select(self.history, now) if now.regional else None",
                "select(self.history, now) if now.regional else self.region",
            ),
        ],
    ),
    "ras/cache.py": (
        "ras_run ras_network edit guidance",
        [
            ("layer.k.to(device), layer.v.to(device)", "layer.k.to(device), layer.v"),
        ],
    ),
    "ras/tokens.py": (
        "ras_select ras_network",
        [
            ("x.permute(0, 5, 1, 3, 2, 4)", "x.permute(0, 5, 1, 4, 2, 3)"),
        ],
    ),
    "ras/given.py": (
        "edit",
        [
            ("mask=mask, record=record, first=first)", "mask=mask, record=record)"),
            ("range(0, steps, self.every or EVERY)", "range(0, steps, EVERY)"),
            (".amin(dim=3).transpose(1, 2)", ".amin(dim=3)"),
        ],
    ),
    "ras/record.py": (
        "edit",
        [
            (
                "self.caches, self.correct = levels, [latents], {}, correct",
                "self.correct = levels, [latents], correct",
            ),
            (
                "torch.lerp(recorded, later[-wanted:].to(fresh.device), self.weight)",
                "torch.lerp(later[-wanted:].to(fresh.device), recorded, self.weight)",
            ),
        ],
    ),
    "ras/trace.py": (
        "ras_run ras_sampling",
        [
            ("count = len(self.active[0]) if", "count = len(self.active) if"),
        ],
    ),
    "ras/upstream.py": (
        "ras_upstream ras_plan",
        [
            (
                "history.skips)).argsort(dim=1)",
                "history.skips)).argsort(dim=1, descending=True)",
            ),
        ],
    ),
    "minidit/flow.py": (
        "flow ras_run edit",
        [
            (
                "            if known is not None:\n"
                "                latents = known.put(latents, i + 1)\n"
                "            if record is not None:\n"
                "                record.end(i, latents)\n"
                "            if callback is not None:\n"
                "                callback(i, run.levels[i], latents, velocity, active)\n",
                "            if record is not None:\n"
                "                record.end(i, latents)\n"
                "            if callback is not None:\n"
                "                callback(i, run.levels[i], latents, velocity, active)\n"
                "            if known is not None:\n"
                "                latents = known.put(latents, i + 1)\n",
            ),
            (
                "latents + correction + step * velocity",
                "latents + step * (velocity + correction)",
            ),
            (
                '(f"uncond[{name!r}]", uncond[name], *wanted',
                '(f"uncond[{name!r}]", cond[name], *wanted',
            ),
        ],
    ),
    "minidit/guidance.py": (
        "flow guidance pipeline::test_skip_layer_guidance_works_with_regions",
        [
            ("unpatchify(pixels, height, width, P)", "unpatchify(pixels, width, height, P)"),
            ("sigma, without, rows, apart)", "sigma, without, rows, cache)"),
        ],
    ),
    "minidit/scheduler.py": (
        "scheduler flow",
        [
            ("corrected_steps: int = 14", "corrected_steps: int = 28"),
        ],
    ),
    "minidit/edit.py": (
        "edit",
        [
            ("* 2 - 1).permute(0, 3, 1, 2)", "* 2 - 1).permute(0, 3, 2, 1)"),
            ("white * images + (1 - white) * kept", "(1 - white) * images + white * kept"),
            (
                "x.repeat_interleave(count // len(x), dim=0)",
                "x.repeat(count // len(x), *[1] * (x.ndim - 1))",
            ),
            ("(levels / 257).round()", "(levels / 256).round()"),
        ],
    ),
    "minidit/pipeline.py": (
        "edit flux_pipeline pipeline",
        [
            (
                "SOLVERS[drawn.correct] if drawn else self.scheduler.default_solver",
                "self.scheduler.default_solver",
            ),
            (
                "downscale * self.transformer.config.patch_size\n            return Source(",
                "downscale\n            return Source(",
            ),
            ('{"ras": regions.Given()} | options', 'options | {"ras": regions.Given()}'),
            ("if not self.offload:\n            parts", "if self.offload:\n            parts"),
        ],
    ),
    "minidit/conditioning.py": (
        "conditioning flux_pipeline pipeline",
        [
            (
                "pipe.text_encoder_2, pipe.tokenizer_2, rows[1])",
                "pipe.text_encoder_2, pipe.tokenizer_2, rows[0])",
            ),
            (
                "pipe.tokenizer_2(negatives + second, length)",
                "pipe.tokenizer_2(negatives + prompts, length)",
            ),
            (
                "skip_guidance, skip_start, skip_stop), {}",
                "skip_guidance, skip_stop, skip_start), {}",
            ),
            (
                "max_sequence_length: int = 256,\n    use_t5",
                "max_sequence_length: int = 512,\n    use_t5",
            ),
        ],
    ),
    "minidit/mmdit.py": (
        "mmdit parts ras_network",
        [
            ("t_shift, t_scale, *t_rest = context", "t_scale, t_shift, *t_rest = context"),
            (
                "image.mlp(modulate(layer_norm(x), shift_mlp",
                "image.mlp(modulate(normed, shift_mlp",
            ),
            ("F.embedding(row * S + column", "F.embedding(row * w + column"),
        ],
    ),
    "minidit/nextdit.py": (
        "nextdit parts ras_network",
        [
            (
                "scale_attn, gate_attn, scale_mlp, gate_mlp = modulation",
                "scale_attn, scale_mlp, gate_attn, gate_mlp = modulation",
            ),
            (
                "nn.LayerNorm(config.cross_attention_dim)",
                "nn.LayerNorm(config.cross_attention_dim, eps=1e-6)",
            ),
            ("(tokens // w, tokens % w), dim=2)", "(tokens // h, tokens % h), dim=2)"),
        ],
    ),
    "minidit/flux.py": (
        "flux ras_network flux_pipeline",
        [
            ("F.pad(place, (0, 0, 0, text))", "F.pad(place, (0, 0, text, 0))"),
            (
                "clip(context.update(text, out[:, K:], *t_rest))",
                "context.update(text, out[:, K:], *t_rest)",
            ),
            ('F.gelu(self.mlp(normed), approximate="tanh")', "F.gelu(self.mlp(normed))"),
        ],
    ),
    "minidit/lumina2.py": (
        "lumina2 ras_network",
        [
            ("1 + chunks[0], 1 + chunks[2]", "1 + chunks[0], 1 + chunks[1]"),
            (
                "F.pad(context_mask.bool(), (N, 0), value",
                "F.pad(context_mask.bool(), (0, N), value",
            ),
        ],
    ),
    "minidit/parts.py": (
        "parts mmdit nextdit clip t5 gemma ras_network",
        [
            ("self.linear(layer_norm(x) * (1 + scale))", "self.linear(layer_norm(x) * scale)"),
        ],
    ),
    "minidit/vae.py": (
        "vae",
        [
            ("F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 1, 1, 1))"),
        ],
    ),
    "minidit/clip.py": (
        "clip",
        [
            ("eos_token_id == LEGACY_EOS", "eos_token_id != LEGACY_EOS"),
        ],
    ),
    "minidit/t5.py": (
        "t5",
        [
            ("position[None, :] - position[:, None]", "position[:, None] - position[None, :]"),
        ],
    ),
    "minidit/gemma.py": (
        "gemma",
        [
            ("causal.triu(1 - window)", "causal.triu(-window)"),
        ],
    ),
    "minidit/tokenizers.py": (
        "tokenizers",
        [
            ("key=len, reverse=True)", "key=len)"),
            ("-(-longest // pad_to) * pad_to", "(longest // pad_to + 1) * pad_to"),
        ],
    ),
}
