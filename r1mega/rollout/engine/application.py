"""Which route goes to which handler, who may call it, and what a mistake is answered with."""

import hmac
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from r1mega.rollout.engine.server import Routes, json_answer

_MAX_BODY_BYTES = 256 << 20
_OPEN_PATHS = ("/health", "/health_generate", "/ready")


@web.middleware
async def _explain_mistakes(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ValueError as error:
        return json_answer({"error": {"message": str(error)}}, status=400)


def _require_key(api_key: str) -> Any:
    expected = f"Bearer {api_key}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path not in _OPEN_PATHS and not hmac.compare_digest(given, expected):
            return json_answer({"error": {"message": "wrong or missing API key"}}, status=401)
        return await handler(request)

    return check


def application(routes: Routes, api_key: str | None) -> web.Application:
    middlewares = [_explain_mistakes]
    if api_key is not None:
        middlewares.insert(0, _require_key(api_key))
    app = web.Application(middlewares=middlewares, client_max_size=_MAX_BODY_BYTES)
    app.add_routes(
        [
            web.post("/generate", routes.generate),
            web.post("/abort_request", routes.abort_request),
            web.post("/pause_generation", routes.pause_generation),
            web.post("/continue_generation", routes.continue_generation),
            web.route("GET", "/flush_cache", routes.flush_cache),
            web.route("POST", "/flush_cache", routes.flush_cache),
            web.post("/begin_weight_update", routes.begin_weight_update),
            web.post("/end_weight_update", routes.end_weight_update),
            web.post("/init_weights_update_group", routes.init_weights_update_group),
            web.post("/destroy_weights_update_group", routes.destroy_weights_update_group),
            web.post("/update_weights_from_distributed", routes.update_weights_from_distributed),
            web.post("/update_weights_from_disk", routes.update_weights_from_disk),
            web.post("/update_weights_from_peers", routes.update_weights_from_peers),
            web.post("/update_weight_version", routes.update_weight_version),
            web.route("GET", "/weights_checker", routes.weights_checker),
            web.route("POST", "/weights_checker", routes.weights_checker),
            web.route("GET", "/get_weights_by_name", routes.get_weights_by_name),
            web.route("POST", "/get_weights_by_name", routes.get_weights_by_name),
            web.get("/health", routes.health),
            web.get("/health_generate", routes.health_generate),
            web.get("/ready", routes.health),
            web.get("/model_info", routes.model_info),
            web.get("/get_model_info", routes.model_info),
            web.get("/server_info", routes.server_info),
            web.get("/get_server_info", routes.server_info),
            web.get("/v1/loads", routes.loads),
        ]
    )
    return app
