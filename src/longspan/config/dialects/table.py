"""All names of Megatron-LM and axolotl that are not keys of longspan, in one table."""

from __future__ import annotations

from longspan.config.dialects.axolotl import KEYS
from longspan.config.dialects.external import ExternalName
from longspan.config.dialects.megatron_flags import FLAGS

#: name, spelled as a key (a flag without its leading dashes, with underscores) -> how it is handled
EXTERNAL_NAMES: dict[str, ExternalName] = KEYS | {
    flag.removeprefix("--").replace("-", "_"): name for flag, name in FLAGS.items()
}
