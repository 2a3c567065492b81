"""Tokenizers and chats for tests of samples."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from longspan.config.keys.data import DatasetConfig
from longspan.data.instruct import Encoder, Recipe

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = [
    "user assistant system [INST] what is the capital of France [/INST] The capital is Paris. Hello there, how are you?",
    "Below is an instruction that describes a task. ### Instruction: ### Response: two plus two is four  \n\n is",
]


def write_tokenizer(folder, kind="bytes", begin=True, **settings):
    """A small tokenizer in a Hugging Face folder.

    Args:
        kind: "bytes" as Llama 3's and Qwen's, "pieces" as Llama 2's and Mistral's.
        begin: put <s> in front, by the post-processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = [chr(c) for c in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    processor = [processors.ByteLevel(trim_offsets=True)] if kind == "bytes" else []
    if begin:
        processor.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    tokenizer.post_processor = processors.Sequence(processor)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def chat(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def encoder(folder, train_on_inputs=False, **source):
    return Encoder(Recipe.make(DatasetConfig(path="x", **source), folder, train_on_inputs))


def learned(coder, sample):
    """The text of each run of tokens that count."""
    tokens, mask = sample
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))).reshape(-1, 2)
    return [coder.tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in edges]


# --- turns of assistants: thoughts, calls, results ---

GLM_TOKENS = ["[gMASK]", "<sop>", "<|system|>", "<|observation|>"]
HARMONY_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"]
DEEPSEEK_TOKENS = ["<U>", "<A>", "<calls>", "</calls>", "<output>", "</output>"]


def write_family_tokenizer(path):
    """A tokenizer with the special tokens of several families; <|end|> and <|assistant|> take in white space, as Phi-3's do."""
    write_tokenizer(path)
    file = str(path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.add_special_tokens([*GLM_TOKENS, *DEEPSEEK_TOKENS, *HARMONY_TOKENS])
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])  # not special, as with Qwen3
    tokenizer.save(file)
    return path


def of(folder, record, template=None, train_on_inputs=False, **source):
    """What is learned of a record, as texts; and the coder."""
    key = "chat_template_jinja" if template and "{" in template else "chat_template"
    source |= {key: template} if template else {}
    coder = encoder(folder, train_on_inputs, type="chat_template", **source)
    record = record if isinstance(record, dict) else {"messages": record}
    return learned(coder, coder("here", record)), coder


def said(content=None, **more):
    return {"role": "assistant", **({} if content is None else {"content": content}), **more}


def call(name="weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text}


ASK = chat("Weather in Paris?")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NO_THOUGHT = "<think>\n\n</think>\n\n"
