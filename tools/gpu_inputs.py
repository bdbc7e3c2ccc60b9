"""Inputs that tools/gpu_check draws on the spot, with nothing but Python: a tiny model, rows for it, vectors."""

import array
import json
import random
import struct
import sys

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'-#[]{}()/"


def bf16(count, draw):
    """Numbers of both signs from 2^-7 to 2^-5 in bf16, as bytes."""
    sign_and_exponent = bytes(0x3C | (byte & 0x80) for byte in range(256))
    out = bytearray(2 * count)
    out[0::2] = draw.randbytes(count)
    out[1::2] = draw.randbytes(count).translate(sign_and_exponent)
    return bytes(out)


def model(folder, hidden, layers, seed=1):
    """Writes a Llama of random weights whose tokens are single characters, as a Hugging Face directory."""
    draw = random.Random(seed)
    heads, kv_heads, width, wide = hidden // 32, hidden // 64, 32, 2 * hidden
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "<|start|>", "Ġ", "Ċ", *CHARACTERS])}
    rows = len(vocabulary)
    shapes = {"model.embed_tokens.weight": [rows, hidden]}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        shapes[name + "input_layernorm.weight"] = [hidden]
        shapes[name + "self_attn.q_proj.weight"] = [heads * width, hidden]
        shapes[name + "self_attn.k_proj.weight"] = [kv_heads * width, hidden]
        shapes[name + "self_attn.v_proj.weight"] = [kv_heads * width, hidden]
        shapes[name + "self_attn.o_proj.weight"] = [hidden, heads * width]
        shapes[name + "post_attention_layernorm.weight"] = [hidden]
        shapes[name + "mlp.gate_proj.weight"] = [wide, hidden]
        shapes[name + "mlp.up_proj.weight"] = [wide, hidden]
        shapes[name + "mlp.down_proj.weight"] = [hidden, wide]
    shapes["model.norm.weight"] = [hidden]
    header, data = {}, []
    end = 0
    for name, shape in shapes.items():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        # Gains are 1, which is 0x3F80.
        data.append(b"\x80\x3f" * count if len(shape) == 1 else bf16(count, draw))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * count]}
        end += 2 * count
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for part in data:
            out.write(part)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width,
        "vocab_size": rows,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": i, "content": token, **plain} for i, token in enumerate(["<|end|>", "<|start|>"])]
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None}
    bpe |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": []}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None}
    tokenizer |= {"added_tokens": special, "pre_tokenizer": bytes_level, "decoder": bytes_level, "model": bpe}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return rows


def training_rows(path, vocabulary, rows, tokens, seed=2):
    """Rows of token ids, the next one a function of the last, so that there is something to learn."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(rows):
            ids = [draw.randrange(2, vocabulary)]
            while len(ids) < tokens:
                ids.append(2 + (5 * ids[-1] + draw.randrange(3)) % (vocabulary - 2))
            out.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def vectors(path, rows, width, seed):
    """Writes a .npy of f32 with elements that are uniform over -127..127."""
    signed = array.array("b", random.Random(seed).randbytes(rows * width))
    values = array.array("f", map(float, signed))
    if sys.byteorder == "big":
        values.byteswap()
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    head += " " * (-(10 + len(head) + 1) % 64) + "\n"
    with open(path, "wb") as out:
        out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode("ascii"))
        values.tofile(out)
