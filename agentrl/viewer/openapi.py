"""The OpenAPI document, from the table of routes: what a client, or a fuzzer, may send and expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import agentrl
from agentrl.viewer.params import Param

_OTHERS: Mapping[str, tuple[str, ...]] = {
    "/api/export": ("application/json", "application/jsonl", "text/html"),
    "/api/media": ("image/png", "image/jpeg", "image/webp", "application/octet-stream"),
}


class Described(Protocol):
    """A route as the document sees it."""

    @property
    def path(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def params(self) -> tuple[Param, ...]: ...
    @property
    def media(self) -> str: ...


def openapi(views: Sequence[Described], post: Described, fields: Mapping[str, tuple[type, bool]]) -> dict[str, Any]:
    """The document of the GET routes `views` and of `post`, whose JSON body has `fields` (name: type, required)."""
    error = {
        "description": "one sentence says why",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    errors = {code: error for code in ("400", "401", "403", "404", "405", "409", "413", "414")}
    paths: dict[str, Any] = {}
    for view in views:
        content: dict[str, Any] = {kind: {} for kind in _OTHERS.get(view.path, (view.media,))}
        if list(content) == ["application/json"]:
            content["application/json"] = {"schema": {"type": "object"}}
        paths[view.path] = {
            "get": {
                "summary": view.summary,
                "parameters": [param.schema() for param in view.params],
                "responses": {"200": {"description": "found", "content": content}, **errors},
            }
        }
    kinds: Mapping[type, dict[str, Any]] = {str: {"type": "string"}, int: {"type": "integer"}}
    properties: dict[str, Any] = {
        name: kinds[kind] if required else {"anyOf": [kinds[kind], {"type": "null"}]}
        for name, (kind, required) in fields.items()
    }
    properties["mode"] = {"type": "string", "enum": ["check", "fork"]}
    body = {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, (_, required) in fields.items() if required],
        "properties": properties,
    }
    paths[post.path] = {
        "post": {
            "summary": post.summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": {"description": "started", "content": {"application/json": {"schema": {"type": "object"}}}},
                **errors, "415": error, "429": error,
            },
        }
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "AgentRL viewer", "version": agentrl.__version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}
        },
    }
