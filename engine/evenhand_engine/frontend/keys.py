"""Keys: what handlers find on an application and on a request, whoever generates."""

from typing import Any

from aiohttp import web

from evenhand_engine.frontend.body_memory import Held
from evenhand_engine.frontend.settings import ServerSettings
from evenhand_engine.frontend.write_timeout import WriteTimeout

SETTINGS = web.AppKey("settings", ServerSettings)
TENANT_ID = web.RequestKey("tenant_id", str)
REQUEST_ID = web.RequestKey("request_id", str)
BODY = web.RequestKey("body", Held)
WRITES = web.RequestKey("writes", WriteTimeout)
LOG_FIELDS = web.RequestKey("log_fields", dict[str, Any])
"""What a handler adds to its line in the access log."""
