"""Tiny models of real architectures, a tiny tokenizer, hand-written HellaSwag rows."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def make_row(ind, label, activity="Cooking", ctx_a="A man stands in a kitchen.", ctx_b="he", endings=None, **more):
    endings = endings or ["cuts an onion.", "flies to the moon.", "paints a car red.", "sings to a fish in a bowl."]
    ctx = f"{ctx_a} {ctx_b}".strip()
    row = {"ind": ind, "activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": ctx, "endings": endings}
    return row | {"source_id": f"test~{ind}", "split": "val", "split_type": "indomain", "label": str(label)} | more


# Every oddity that lm-evaluation-harness's text and token handling meets
ODD_ROWS = [
    make_row(0, 0),
    make_row(1, 1, ctx_b=""),
    make_row(
        2,
        2,
        activity="Fixing a roof",
        ctx_a="[header] How to fix a roof [title] Get a ladder. [step] Climb.",
        ctx_b="THEN you",
    ),
    make_row(3, 3, ctx_a="Two  spaces and   three,", ctx_b="", endings=["a  b", "c [step] d", "[title] e f", "g   h"]),
    make_row(4, 0, ctx_a="Short.", ctx_b="", endings=[" ".join(["word"] * 40), "two", "three words here", "x"]),
    make_row(
        5,
        1,
        ctx_a=" ".join(f"word{i}" for i in range(60)),
        ctx_b="and so",
        endings=["goes on.", "stops.", "is", "ends it."],
    ),
    make_row(6, 2, ctx_a="It ends with a marker [substeps]", ctx_b=""),
    make_row(7, 3, ctx_a="naïve café – 東京", ctx_b="élan", endings=["déjà vu.", "東京タワー", "fiancé", "ok 🙂."]),
]


def many_rows(count, seed=0):
    """Rows with a rule to learn: the right ending repeats the activity's word."""
    generator = torch.Generator().manual_seed(seed)
    words = ["apple", "bridge", "candle", "drum", "eagle", "flute", "garden", "hammer"]
    rows = []
    for ind in range(count):
        pick = torch.randperm(len(words), generator=generator).tolist()
        label = int(torch.randint(4, (), generator=generator))
        endings = [f"takes the {words[p]} home." for p in pick[:4]]
        filler = " ".join(words[int(torch.randint(8, (), generator=generator))] for _ in range(ind % 7))
        rows.append(
            make_row(ind, label, activity=words[pick[label]], ctx_a=f"Someone sees it {filler}.", endings=endings)
        )
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer(bos=False, merge_across_words=False):
    """A byte-level BPE trained on the test rows. merge_across_words: no pre-tokenizer, so merges cross ' '."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if merge_across_words:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{r['activity_label']}: {r['ctx']} {e}" for r in ODD_ROWS + many_rows(60) for e in r["endings"]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>" if bos else None
    )


TINY = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 16}),
    "gemma2": (
        transformers.Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 5.0, "tie_word_embeddings": True, "sliding_window": 16},
    ),
    "gemma3": (transformers.Gemma3TextConfig, {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16}),
    "phi3": (transformers.Phi3Config, {}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
    "gpt2": (
        transformers.GPT2Config,
        {"n_positions": 128, "tie_word_embeddings": True, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 6.0, "embedding_multiplier": 3.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "phi": (transformers.PhiConfig, {}),  # its head has a bias
    # of an expert that no token goes to the router's gradient is rounding noise, and so are Adafactor's steps: none such
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 4}),
}


def make_model(architecture="llama", seed=0, **changes):
    """A tiny random fp32 model; norms and biases are made random too, so that none is 0 or 1 and goes unseen."""
    config_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**(TINY | own | changes)), dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()
