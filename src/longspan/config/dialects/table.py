"""Every name of Megatron-LM and axolotl that is no key here, in one table."""

from __future__ import annotations

from longspan.config.dialects.axolotl import KEYS
from longspan.config.dialects.external import ExternalName
from longspan.config.dialects.megatron_flags import FLAGS

#: name, as a key is written (a flag without its dashes, underscored) -> how it is handled
EXTERNAL_NAMES: dict[str, ExternalName] = KEYS | {
    flag.removeprefix("--").replace("-", "_"): name for flag, name in FLAGS.items()
}
