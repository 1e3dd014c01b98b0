"""What the axolotl plugin adds to axolotl's configuration."""

from typing import Literal

from pydantic import BaseModel


class RopeFusedOptions(BaseModel, extra="forbid"):
    """Options of :func:`rope_fused.patch`."""

    precision: Literal["exact", "hf"] = "exact"
    fuse_projection: bool = True
    backend: str = "auto"
    strict: bool = False


class RopeFusedArgs(BaseModel):
    """The key ``rope_fused``."""

    rope_fused: RopeFusedOptions | None = None
