"""`POST /search`: the engine over HTTP, for programs, with a page that says how it is called."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

import cirloop
from cirloop.io.redact import sanitize
from cirloop.tools.search.config import MAX_K
from cirloop.tools.search.engine import MAX_TEXT, Engine, Reference, decode_upload
from cirloop.types import UserError

PATHS = ("/search", "/docs", "/openapi.json")
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
FIELDS = ("image", "reference", "text", "iteration", "top_k")
UNPROCESSABLE = 422
"""The status where something is wrong with what is asked."""


class Result(BaseModel):
    """An image found: its id in the gallery, its file's name, its cosine with the query, and its
    place from 1."""

    image: str
    name: str
    score: float
    rank: int


class SearchAnswer(BaseModel):
    """The best images, best first; `iteration` is the model that answered, `ms` the time it
    took."""

    results: list[Result]
    iteration: str
    ms: float


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: str


ERRORS: dict[int | str, dict[str, Any]] = {
    413: {"model": Problem, "description": "The request is too large."},
    422: {"model": Problem, "description": "Something is wrong with what is asked."},
    429: {"model": Problem, "description": "Too many requests at once; ask again in a second."},
}


def build_api(engine: Engine, label: str, k: int) -> FastAPI:
    """Return the app: `POST /search`, and `/docs` about it, made of `/openapi.json`."""
    app = FastAPI(
        title="cirloop search", version=cirloop.__version__, docs_url=None, redoc_url=None
    )

    @app.post("/search", responses=ERRORS, dependencies=[Depends(_check_form)])
    def search(
        image: Annotated[UploadFile | None, File(description="The reference, a file.")] = None,
        reference: Annotated[
            str | None, Form(description="Instead of a file: the id of an image of the gallery.")
        ] = None,
        text: Annotated[
            str | None,
            Form(max_length=MAX_TEXT, description="What should be different; alone, what to find."),
        ] = None,
        iteration: Annotated[
            str | None, Form(description="Whose model answers; by default that of the page.")
        ] = None,
        top_k: Annotated[int, Form(ge=1, le=MAX_K, description="Results.")] = k,
    ) -> SearchAnswer:
        """Search with an image or its id, a text, or both."""
        chosen = engine.label(iteration or label)
        answer = engine.search(chosen, _reference(engine, image, reference), text or None, top_k)
        results = [
            Result(
                image=hit.image,
                name=PurePosixPath(hit.image).name,
                score=hit.score,
                rank=hit.rank,
            )
            for hit in answer.hits
        ]
        return SearchAnswer(results=results, iteration=chosen, ms=answer.ms)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    return app


def docs_page(schema: dict[str, Any]) -> str:
    """Return a page about an OpenAPI schema, which fetches and runs nothing."""
    loader = PackageLoader("cirloop.tools.demo", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("docs.html.j2").render(schema=schema)


async def _check_form(request: Request) -> None:
    """Raise UserError for a request whose body is no form, or has fields that there are not."""
    kind = request.headers.get("content-type", FORMS[0])
    if not kind.lower().startswith(FORMS):
        raise UserError(f"the request holds {kind:.100}. Send its fields as a form.")
    unknown = {*await request.form()}.difference(FIELDS)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"{names:.200}: no such field. There are: {', '.join(FIELDS)}.")


def _reference(engine: Engine, image: UploadFile | None, name: str | None) -> Reference | None:
    """Return the reference. Raises UserError where both are given, or it is no image."""
    if image is not None and name:
        raise UserError("image and reference are both given; give one of them.")
    if image is not None:
        return decode_upload(image.file.read(), sanitize(image.filename or "the image")[:200])
    return engine.known(name) if name else None


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """Answer with what is wrong, in one line for each problem."""
    if isinstance(error, RequestValidationError):
        lines = [f"{row['loc'][-1]}: {row['msg']}" for row in error.errors()]
        return JSONResponse({"detail": "; ".join(lines)}, UNPROCESSABLE)
    return JSONResponse({"detail": sanitize(str(error))}, UNPROCESSABLE)
