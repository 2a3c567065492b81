"""``longspan prepare``: turns text files, or the datasets of a config, into ``.bin/.idx``."""

from __future__ import annotations

import json
from collections.abc import Sequence

from longspan.cli.options import number, read_config, take_options
from longspan.cli.preprocess import FILE_OPTIONS, prepare_files
from longspan.config.resolve import resolve
from longspan.runs.prepare import prepare_data

USAGE = """\
usage: longspan prepare CONFIG [--show N] [--json] [--any-key value]
       longspan prepare --input PATH ... --output-prefix PREFIX TOKENIZER [options]

Tokenises into Megatron's .bin/.idx. With a config: its datasets, into dataset_prepared_path.
  --show N              the first N samples of the run: what of their text is learned, where documents begin
  --json                the same for scripts, with every token; without --show the numbers of tokens alone
With files:
  --input PATH ...      text and .jsonl files, patterns ('*.jsonl'), folders of text and code, or python-stdlib
  --output-prefix P     writes P_KEY_document.bin and .idx for each key
  --json-keys KEY ...   the fields of a .jsonl line that hold text (default text); --json-key KEY is the same
  --append-eod          put the end-of-document token behind each document (the default)
  --no-append-eod       do not
  --workers N           processes that tokenise (default 1, with a thread a core)
  --split-sentences     a sequence for each sentence, by nltk, into P_KEY_sentence (--lang LANGUAGE, default english)
  --keep-newlines       sentences keep the blanks and line ends behind them
  --log-interval N      a line every N documents
  --partitions N        accepted, without effect
TOKENIZER is one of
  --tokenizer T         tokenizer.json or the folder that holds it (also --tokenizer-model T)
  --train-vocab-size N  train a byte-level BPE tokenizer of N tokens into P_tokenizer/
  --vocab-file V --merge-file M                  GPT-2's BPE (--tokenizer-type GPT2BPETokenizer)
  --tokenizer-type NullTokenizer --vocab-size N  the text is numbers below N; N ends a document
"""

OPTIONS = {"--show": True, "--json": False}


def run(arguments: Sequence[str]) -> int:
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(USAGE)
        return 0 if arguments else 2
    if any(argument.partition("=")[0] in FILE_OPTIONS for argument in arguments):
        return prepare_files(arguments)
    own, rest, problems = take_options(arguments, OPTIONS)
    show, as_json = number(own, "--show", problems), "--json" in own
    reading = read_config("prepare", rest, list(OPTIONS), problems)
    assert reading.config is not None
    checked = resolve(reading.config, bad_keys=reading.bad, earlier=reading.problems)
    config = prepare_data(checked, show=not as_json).config
    if as_json:
        from longspan.cli.show_samples import describe

        print(json.dumps(describe(config, show or 0), ensure_ascii=False))
        return 0
    for source in [*config.datasets, *config.test_datasets]:
        print(f"{source.path} -> {source.prepared}")
    print(f"tokenizer: {config.tokenizer_config or 'none'}, vocabulary {config.vocab_size}")
    if show:
        from longspan.cli.show_samples import describe, show_samples

        show_samples(describe(config, show))
    return 0
