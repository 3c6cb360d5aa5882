"""What the server says of itself: models, versions, load, settings, health. Nothing of tenants."""

from importlib.metadata import version

from aiohttp import web

from evenhand_engine.errors import Refusal
from evenhand_engine.frontend.door import DOOR
from evenhand_engine.frontend.engine_service import ENGINE, EngineService
from evenhand_engine.openai.answers import (
    KvCache,
    Load,
    Model,
    Models,
    ServedDevice,
    ServedModel,
    ServerConfig,
    ServerInfo,
    Version,
)
from evenhand_engine.openai.errors import error_response, refuse_draining, refuse_unconfigured
from evenhand_engine.openai.responses import json_response, metrics_response


async def list_models(request: web.Request) -> web.Response:
    service = request.app[ENGINE]
    return json_response(Models(data=[_model(service, name) for name in service.model_names]))


async def show_model(request: web.Request) -> web.Response:
    service, name = request.app[ENGINE], request.match_info["model"]
    service.check_model(name)
    return json_response(_model(service, name))


def _model(service: EngineService, name: str) -> Model:
    return Model(
        id=name, created=service.created, root=service.info.model_name, max_model_len=service.info.max_model_len
    )


async def show_health(request: web.Request) -> web.Response:
    """200 with an empty body, as vLLM's, only while the engine makes progress."""
    problem = await request.app[DOOR].health()
    return web.Response() if problem is None else error_response(Refusal(503, "unhealthy", problem, retry_after=1))


async def show_ready(request: web.Request) -> web.Response:
    """Like /health, and 503 before there is a config and as soon as the server drains, so that nothing is sent here."""
    if request.app[DOOR].draining:
        return error_response(refuse_draining())
    if not request.app[DOOR].is_configured:
        return error_response(refuse_unconfigured())
    return await show_health(request)


async def show_version(request: web.Request) -> web.Response:
    return json_response(Version(version("evenhand")))


async def show_load(request: web.Request) -> web.Response:
    """As vLLM's, where it is counted on request; here always."""
    return json_response(Load(await request.app[DOOR].load()))


async def show_server_info(request: web.Request) -> web.Response:
    """How the server was started: as vLLM's, which has it in development only, and says more."""
    form = request.query.get("config_format", "text")
    if form not in ("text", "json"):
        raise Refusal(400, "invalid_value", "`config_format` is text or json.", param="config_format")
    service = request.app[ENGINE]
    info, settings = service.info, service.settings
    config = ServerConfig(
        ServedModel(info.model_name, list(service.model_names), info.max_model_len, info.dtype),
        KvCache(info.block_size, info.num_kv_blocks),
        ServedDevice(info.device),
        settings.tool_call_parser,
        settings.reasoning_parser,
    )
    system = {"evenhand_version": version("evenhand")}
    return json_response(ServerInfo(config if form == "json" else str(config), {}, system))


async def show_metrics(request: web.Request) -> web.Response:
    """The `vllm:*` set, which says nothing of tenants; theirs is on the admin port."""
    return metrics_response(await request.app[DOOR].metrics_text())
