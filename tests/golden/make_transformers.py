"""Makes transformers.json: logits of tiny networks in PyTorch; and checks that weights pass in both directions.

    python make_transformers.py

It needs torch and transformers. Weights are drawn from the tensors' names by :func:`draw`; the test draws them again.
"""

import json
import tempfile
import zlib
from pathlib import Path

import numpy as np

TOKENS = np.array([[0, 0, 3, 9, 4, 1], [5, 10, 2, 7, 7, 8]])
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
_COMMON = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip
_GPT2 = {"vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 8}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# The entries of config.json as versions 4 and 5 of transformers write them
CONFIGS = {
    "llama": {
        "model_type": "llama", **_COMMON, "tie_word_embeddings": False, "head_dim": 4,
        "rope_theta": 500.0, "rope_scaling": _LLAMA3,
    },
    "llama with biases": {
        "model_type": "llama", **_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "head_dim": None, "hidden_size": 16,
    },
    "qwen2": {"model_type": "qwen2", **_COMMON, "hidden_size": 16, "tie_word_embeddings": True, "rope_theta": 100.0},
    "qwen3": {
        "model_type": "qwen3", **_COMMON, "tie_word_embeddings": True, "head_dim": 6,
        "rope_parameters": {"rope_theta": 200.0, "rope_type": "default"},
    },
    "gpt2": {"model_type": "gpt2", **_GPT2},
}  # fmt: skip


def draw(name, shape):
    """A tensor by its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        return (0.4 * rng.normal(size=shape)).astype(np.float32)
    return ((0.2 if name.endswith("bias") else 1) * rng.uniform(0.5, 1.5, size=shape)).astype(np.float32)


def main():
    import jax
    import torch
    import transformers

    from distill_jax import models

    def logits(net):
        inputs = {"input_ids": TOKENS, "attention_mask": MASK, "position_ids": POSITIONS}
        with torch.no_grad():
            found = net.eval()(**{name: torch.tensor(array) for name, array in inputs.items()}).logits
        return found.float().numpy()

    def compare(ours, theirs, tolerance):
        error = np.abs(np.asarray(ours) - theirs)[MASK == 1].max()
        print(f"  difference {error:.1e} of {np.abs(theirs).max():.2f}")
        assert error < tolerance

    ours_of = jax.jit(lambda model: model({"tokens": TOKENS, "segments": MASK}))
    golden = {}
    for kind, entries in CONFIGS.items():
        print(kind)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            (path / "config.json").write_text(json.dumps(entries))
            config = transformers.AutoConfig.from_pretrained(path)
            net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            state = {
                name: torch.tensor(draw(name, tuple(value.shape))) for name, value in net.state_dict().items()
            }
            if config.tie_word_embeddings:
                state["lm_head.weight"] = next(iter(state.values()))  # the embedding
            net.load_state_dict(state)
            expected = logits(net)
            tensors = {name: list(value.shape) for name, value in net.state_dict().items()}
            if config.tie_word_embeddings:
                del tensors["lm_head.weight"]
            golden[kind] = {"tensors": tensors, "logits": expected[MASK == 1].tolist()}
            # What transformers wrote, in one file and in several, is what we read
            for name, size in (("one", "1GB"), ("several", "3KB")):
                net.save_pretrained(path / name, max_shard_size=size)
                assert len(list((path / name).glob("*.safetensors"))) == 1 or name == "several"
                model = models.load_pretrained(path / name)
                compare(ours_of(model), expected, 1e-4)
            # What we write, transformers reads
            for name, size in (("back", 10**9), ("back in several", 3000)):
                models.save_pretrained(path / name, model, shard_bytes=size)
                back, info = transformers.AutoModelForCausalLM.from_pretrained(
                    path / name, attn_implementation="eager", output_loading_info=True, dtype="auto"
                )
                assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
                    info
                )
                assert type(back) is type(net)
                compare(logits(back), expected, 1e-6)
            # bfloat16, both ways
            net.to(torch.bfloat16).save_pretrained(path / "half")
            half = models.load_pretrained(path / "half")
            assert half.params["embedding"].dtype == "bfloat16"
            compare(ours_of(half), logits(net), 0.08 * np.abs(expected).max())  # both round
            models.save_pretrained(path / "half back", half)
            back = transformers.AutoModelForCausalLM.from_pretrained(path / "half back", dtype="auto")
            assert back.dtype == torch.bfloat16
            theirs = net.state_dict()
            for name, value in back.state_dict().items():
                assert torch.equal(value, theirs[name]), name
            # Greedy continuation of left-padded prompts
            theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "back").generate(
                torch.tensor(TOKENS[:, :5]), attention_mask=torch.tensor(MASK[:, :5]), max_new_tokens=3,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            prompts = {"tokens": TOKENS[:, :5], "segments": MASK[:, :5]}
            ours = models.generate(model, prompts, length=3, temperature=0)["tokens"]
            assert np.array_equal(theirs.numpy(), ours)
    text = json.dumps(golden)
    golden = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
    lines = [f" {json.dumps(kind)}: {json.dumps(value)}" for kind, value in golden.items()]
    Path(__file__).with_name("transformers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
