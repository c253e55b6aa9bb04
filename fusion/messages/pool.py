"""How a worker joins, and how others find it."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from fusion.messages.base import Message

WORKER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Device(Message):
    """What a worker says of its machine on joining; a rate of 0 was not measured."""

    kind: Literal["cpu", "cuda"] = "cpu"
    description: str = ""
    capability: str = Field("", description="Of the instructions that kernels are chosen by, as torch names it.")
    cores: int = 1
    threads: int = 1
    machine: str = Field("", max_length=64, description="The same for workers of one machine; empty: unknown.")
    processor: str = Field(
        "", max_length=64, description="The same for workers that share their cores, or their GPU; empty: unknown."
    )
    memory_bytes: int = 0
    flops_per_second: Rate = Field(0.0, description="Of large matrix products, or of training where it is declared.")
    declared: bool = Field(False, description="The speed was given by a person, not measured.")
    convolution_flops_per_second: Rate = 0.0
    bytes_per_second: Rate = Field(0.0, description="Read and written by operators that compute little.")
    training_share: float = Field(
        0.0, ge=0, le=1, description="Of the speed of matrix products, what training reaches."
    )
    seconds_per_call: float = Field(0.0, ge=0, le=1, description="Fixed time of an operator call.")
    convolution_share: float = Field(
        0.0, ge=0, le=1, description="Of the speed of convolutions, what training reaches."
    )
    seconds_per_convolution: float = Field(0.0, ge=0, le=1, description="Fixed time of a convolution's call.")
    seconds_after_rest: float = Field(
        0.0, ge=0, le=1, description="What a task takes longer after a rest than right after another one."
    )


class JoinRequest(Message):
    """Body of `POST /api/v1/workers`."""

    name: str = Field(pattern=WORKER_NAME)
    protocol_version: int
    fusion_version: str
    torch_version: str
    device: Device
    data_endpoint: str = Field(description="Where peers connect, `tcp://host:port`.")
    public_key: str = Field(description="CURVE public key, Z85.", min_length=40, max_length=40)
    probes: bool = Field(False, description="It measures its links to other workers when it is asked to.")
    relay_port: int = Field(0, ge=0, lt=65536, description="Where it offers a relay to other workers; 0: it does not.")

    @field_validator("data_endpoint")
    @classmethod
    def _can_be_read(cls, endpoint: str) -> str:
        try:
            parts = urlsplit(endpoint)
            proper = parts.scheme == "tcp" and parts.hostname and parts.port
        except ValueError:
            proper = False
        if not proper:
            raise ValueError(f"{endpoint[:80]!r} is not tcp://HOST:PORT")
        return endpoint


class JoinResponse(Message):
    """Answer to a join: how to reach the control channel."""

    worker: str
    incarnation: str
    control_endpoint: str
    control_public_key: str
    heartbeat_seconds: float
    time: float | None = Field(None, description="By the coordinator's clock, seconds since the epoch.")
    seen_as: str = Field("", description="The address that the request came from.")
    reachable: bool | None = Field(
        None, description="Whether the coordinator could connect to `data_endpoint`; null: it did not try."
    )


class PeerAddress(Message):
    worker: str
    endpoint: str
    public_key: str
