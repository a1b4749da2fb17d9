"""What goes over the wire: OpenAI's images API with qdit's extensions."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import models_json_schema

from ..backend import Generation
from ..cards import ModelCard
from ..classes import label_of
from ..errors import BadRequestError
from ..images import DEFAULT_QUALITY, ImageFormat
from ..settings import RequestLimits

_MAX_SEED = 2**63 - 1  # what JSON readers with 64-bit integers can hold
_RANDOM_SEED_BITS = 32  # short enough to type again, and exact in JavaScript


class ImageRequest(BaseModel):
    """POST /v1/images/generations. Fields that OpenAI has and qdit cannot honour take one value."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(
        min_length=1, max_length=1000, description="A class: its name or its id.", examples=["cat"]
    )
    model: str | None = Field(
        default=None, max_length=200, description="A loaded model's id. Default: the first one."
    )
    n: int | None = Field(default=1, ge=1, description="How many images.")
    size: str | None = Field(
        default="auto", max_length=20, description="'auto' or the model's own WIDTHxHEIGHT."
    )
    response_format: Literal["b64_json"] | None = Field(
        default="b64_json", description="Images come in the answer; nothing is stored to link to."
    )
    output_format: ImageFormat | None = "png"
    output_compression: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description=f"Quality of jpeg and webp. Default: {DEFAULT_QUALITY}.",
    )
    quality: Literal["auto", "standard"] | None = "auto"
    background: Literal["auto", "opaque"] | None = "auto"
    moderation: Literal["auto"] | None = "auto"
    user: str | None = Field(default=None, max_length=256, description="Written to the log.")
    stream: bool | None = Field(default=False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        default=0, ge=0, le=3, description="Previews of each image, with `stream`."
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        le=_MAX_SEED,
        description="Equal requests with equal seeds give equal images. Default: random, told in "
        "the answer.",
    )
    num_inference_steps: int | None = Field(default=None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        default=None, ge=0, description="Classifier-free guidance; 1.0 is none, at half the work."
    )
    scheduler: str | None = Field(
        default=None, max_length=100, description="A diffusers scheduler that the model lists."
    )


def request_model(limits: RequestLimits, cards: Mapping[str, ModelCard]) -> type[ImageRequest]:
    """`ImageRequest` with this server's limits, defaults and choices in its JSON schema.

    What `generation_of` and `find_card` refuse with better words is only described here.
    """
    sizes = sorted({card.size for card in cards.values()})
    schedulers = sorted({name for card in cards.values() for name in card.schedulers})
    fields: dict[str, Any] = {
        "n": _field("n", ge=1, le=limits.max_images),
        "num_inference_steps": _field(
            "num_inference_steps", ge=1, le=limits.max_steps, default=limits.default_steps
        ),
        "guidance_scale": _field(
            "guidance_scale", ge=0, le=limits.max_guidance, default=limits.default_guidance
        ),
        "model": _field("model", max_length=200, json_schema_extra={"enum": [*cards, None]}),
        "size": _field("size", max_length=20, json_schema_extra={"enum": ["auto", *sizes, None]}),
        "scheduler": _field(
            "scheduler", max_length=100, json_schema_extra={"enum": [*schedulers, None]}
        ),
    }
    return create_model("ImageRequest", __base__=ImageRequest, **fields)


def _field(name: str, **changes: Any) -> tuple[Any, Any]:
    own = ImageRequest.model_fields[name]
    changes = {"default": own.default, "description": own.description} | changes
    return own.annotation, Field(**changes)


class Image(BaseModel):
    """One image. `seed` and `index` say which of that seed's images it is."""

    b64_json: str
    index: int
    seed: int
    label: int
    class_name: str


class Usage(BaseModel):
    """OpenAI's token counts: one text token, the class; image tokens of the transformer."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer without `stream`."""

    created: int
    model: str
    size: str
    output_format: ImageFormat
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    data: list[Image]
    usage: Usage


class ProgressEvent(BaseModel):
    """qdit's own event: OpenAI's clients pass on types that they do not know."""

    type: Literal["image_generation.progress"] = "image_generation.progress"
    step: int
    steps: int
    eta_seconds: float | None


class ImageEvent(BaseModel):
    """A preview or a finished image, with every field that OpenAI's event has."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    created_at: int
    size: str
    output_format: ImageFormat
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    partial_image_index: int | None = None
    usage: Usage | None = None
    model: str
    index: int
    seed: int
    label: int
    class_name: str


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every answer of status 400 and above."""

    error: ErrorDetail


_EVENTS = (ProgressEvent, ImageEvent, ErrorResponse)
_REFERENCE = "#/components/schemas/{model}"
# One server-sent event as an object of its fields, which is how OpenAPI 3.2 describes them.
EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {
                "oneOf": [{"$ref": _REFERENCE.format(model=kind.__name__)} for kind in _EVENTS]
            },
        },
    },
}


def event_components() -> dict[str, Any]:
    """What `EVENT_SCHEMA` refers to, for the components of the OpenAPI document."""
    wanted: list[Any] = [(kind, "serialization") for kind in _EVENTS]
    _, made = models_json_schema(wanted, ref_template=_REFERENCE)
    found: dict[str, Any] = made["$defs"]
    return found


class Model(BaseModel):
    """OpenAI's model object, and what a client may want to know before it asks for images."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["qdit"] = "qdit"
    precision: str
    engine: str
    size: str
    classes: list[str]
    class_count: int
    schedulers: list[str]
    default_scheduler: str


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class HealthResponse(BaseModel):
    """GET /health. `models`: the state of each engine."""

    status: Literal["ready", "not ready", "not live"]
    version: str
    models: dict[str, str]


def model_of(card: ModelCard) -> Model:
    """The API's view of a card."""
    return Model(
        id=card.id,
        created=card.created,
        precision=card.precision,
        engine=card.engine,
        size=card.size,
        classes=list(card.class_names),
        class_count=card.class_count,
        schedulers=list(card.schedulers),
        default_scheduler=card.default_scheduler,
    )


def usage_of(card: ModelCard, images: int) -> Usage:
    """Token counts of an answer."""
    made = images * card.tokens
    return Usage(
        input_tokens=1,
        input_tokens_details={"text_tokens": 1, "image_tokens": 0},
        output_tokens=made,
        total_tokens=1 + made,
    )


def generation_of(
    request: ImageRequest,
    card: ModelCard,
    limits: RequestLimits,
    request_id: str,
    seconds: float,
) -> Generation:
    """The generation that a request asks for. Raises `BadRequestError` with the field at fault."""
    if request.size not in (None, "auto", card.size):
        raise BadRequestError(f"this model makes {card.size} only, got {request.size!r}", "size")
    if request.scheduler is not None and request.scheduler not in card.schedulers:
        raise BadRequestError(
            f"the scheduler must be one of {', '.join(card.schedulers)}, got {request.scheduler!r}",
            "scheduler",
        )
    image_format = request.output_format or "png"
    if request.output_compression is not None and image_format == "png":
        raise BadRequestError("png has no output_compression", "output_compression")
    if request.partial_images and not request.stream:
        raise BadRequestError("partial images are sent with stream: true only", "partial_images")
    steps, guidance = request.num_inference_steps, request.guidance_scale
    return Generation(
        request_id=request_id,
        model=card.id,
        label=label_of(request.prompt, card),
        images=request.n or 1,
        steps=limits.default_steps if steps is None else steps,
        guidance=limits.default_guidance if guidance is None else guidance,
        seed=secrets.randbits(_RANDOM_SEED_BITS) if request.seed is None else request.seed,
        scheduler=request.scheduler,
        image_format=image_format,
        quality=request.output_compression,
        previews=request.partial_images or 0,
        tells_progress=bool(request.stream),
        seconds=seconds,
    )
