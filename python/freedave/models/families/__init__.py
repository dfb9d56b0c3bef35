"""The families of checkpoints that can be loaded, one file each."""

from freedave.models.families.dream import DREAM
from freedave.models.families.family import Defaults, Family, Source
from freedave.models.families.fast_dllm import FAST_DLLM
from freedave.models.families.llada import LLADA
from freedave.models.families.llada2 import LLADA2
from freedave.models.families.llada_moe import LLADA_MOE, RENAMED
from freedave.models.families.native import NATIVE_FAMILIES
from freedave.models.families.refused import REFUSED
from freedave.models.families.sdar import SDAR
from freedave.models.families.sdar_moe import SDAR_MOE
from freedave.models.families.stable_diffcoder import STABLE_DIFFCODER

__all__ = ["FAMILIES", "REFUSED", "Defaults", "Family", "Source"]

# Where two have the same model_type, and a config.json names no architecture, the last one is meant: LLaDA's first model, and
# the native layout.
FAMILIES: tuple[Family, ...] = (
    LLADA_MOE,
    RENAMED,
    LLADA,
    DREAM,
    SDAR,
    SDAR_MOE,
    LLADA2,
    STABLE_DIFFCODER,
    FAST_DLLM,
    *NATIVE_FAMILIES,
)
