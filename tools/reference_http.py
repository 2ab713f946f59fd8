"""The reference pages of HTTP routes and metrics, from a gateway and a server that are started for them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from moesaic import cli
from tools.markdown import page, slug, table

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 60


def surface() -> tuple[dict[str, Any], str]:
    """Return the OpenAPI description and the metrics of a gateway, and what a server has beside these.

    Both run only for this call.
    """
    description, figures = surface_of("gateway", "--model", "model")
    of_server, more_figures = surface_of("serve", "tales")
    description["paths"] = of_server["paths"] | description["paths"]
    description["components"]["schemas"] = of_server["components"]["schemas"] | description["components"]["schemas"]
    known = set(re.findall(r"^# HELP (\S+)", figures, re.M))
    more = [line for line in more_figures.splitlines() if line.startswith("# ") and line.split()[2] not in known]
    return description, "\n".join([figures, *more])


def surface_of(command: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return the OpenAPI description and the metrics of one process."""
    with tempfile.TemporaryDirectory() as folder:
        keys = str(Path(folder, "keys.json"))
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            cli.main(["keys", "add", "reference", "--admin", "--file", keys])
        key = re.findall(r"msc-\S+", shown.getvalue())[0]
        jobs = ["--jobs", str(Path(folder, "jobs.sqlite"))] if command == "gateway" else []
        line = [command, *arguments, "--port", "0", "--keys", keys, *jobs]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MOESAIC_")}
        program = [sys.executable, "-c", f"from moesaic.cli import main; raise SystemExit(main({line!r}))"]
        with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=clean) as process:
            try:
                assert process.stderr is not None
                events = (json.loads(text) for text in process.stderr)
                url = next(event["url"] for event in events if "url" in event)
                return json.loads(get(f"{url}/openapi.json", key)), get(f"{url}/metrics", key)
            finally:
                process.terminate()


def get(url: str, key: str) -> str:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        return str(response.read().decode())


def http_api(description: dict[str, Any]) -> str:
    routes: dict[str, list[tuple[str, str, str, str]]] = {name: [] for name in ("Inference", "Models", "Jobs")}
    routes |= {"Administration": [], "Workers": [], "AIME": [], "Operation": []}
    seen = set()
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            shown = re.sub(r"\b(mixtral|llama3)_chat\b", "{endpoint}", path)
            if (method, shown) not in seen:
                seen.add((method, shown))
                group = group_of(shown, operation)
                summary = re.sub(r"^(Workers|Admins): ", "", operation["summary"])
                summary = summary[:1].upper() + summary[1:]
                row = (f"`{method.upper()} {shown}`", summary, body_link(operation), key_of(shown, group, operation))
                routes[group].append(row)
    parts = [
        "`moesaic serve` has the groups Inference, Models and Operation. `moesaic gateway` has all but Models. A "
        "running server returns this description as OpenAPI 3.1 from `GET /openapi.json`.",
        "The web chat (`GET /` for browsers, and files below `/web/`) needs no key to load; its requests do.",
    ]
    for group, rows in routes.items():
        parts += [f"## {group}", table(("route", "meaning", "body", "key"), rows)]
    parts += ["## Bodies", "Fields without a default are required."]
    schemas = {name: schema for name, schema in description["components"]["schemas"].items() if is_shown(name, schema)}
    for name, schema in schemas.items():
        parts += [f"### {short(name)}", table(("field", "type", "default"), body_rows(schema, schemas))]
    return page("HTTP routes", *parts)


def group_of(path: str, operation: dict[str, Any]) -> str:
    if path.startswith(("/admin/models", "/admin/presets")):
        return "Models"
    if path.startswith("/admin"):
        return "Administration"
    if path.startswith("/worker/"):
        return "Workers"
    if path.startswith("/v1/jobs"):
        return "Jobs"
    if "402" in operation["responses"] or path.startswith(("/worker_", "/api/", "/stream_progress")):
        return "AIME"
    operating = ("/health", "/ping", "/ready", "/metrics", "/load", "/openapi.json", "/version")
    return "Operation" if path in operating or (path == "/" and "requestBody" not in operation) else "Inference"


def key_of(path: str, group: str, operation: dict[str, Any]) -> str:
    if group == "AIME":
        return "worker's key or the endpoint's, in the body" if path.startswith("/worker_") else "in the body or query"
    if "security" not in operation:
        return "none"
    if path.startswith("/admin"):
        return "administrator's"
    return "worker's" if group == "Workers" else "client's"


def short(name: str) -> str:
    """Return the name of a schema for readers, without the package; equal names keep their module in front."""
    return name.removeprefix("moesaic.serve.dialects.")


def body_link(operation: dict[str, Any]) -> str:
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    name = short(str(schema.get("$ref", "")).rpartition("/")[2])
    return f"[{name}](#{slug(name)})" if name else ""


def is_shown(name: str, schema: dict[str, Any]) -> bool:
    return bool(schema.get("properties")) and not name.startswith("_")


def body_rows(schema: dict[str, Any], shown: Container[str]) -> Iterator[tuple[str, str, str]]:
    for name, kind in schema["properties"].items():
        default = json.dumps(kind["default"]) if "default" in kind else ""
        if not default and name not in schema.get("required", ()) and kind.get("type") == "object":
            default = "{}"  # msgspec 0.22 leaves this default out, 0.23 does not
        yield f"`{name}`", kind_of(kind, shown), f"`{default}`" if default else ""


def kind_of(schema: dict[str, Any], shown: Container[str]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{short(name)}](#{slug(short(name))})" if name in shown else "array"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind_of(choice, shown) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"array of {kind_of(schema['items'], shown)}"
    return str(schema.get("type", "any"))


def metrics(text: str) -> str:
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", text, re.M))
    groups: dict[str, list[tuple[str, str, str]]] = {name: [] for name in ("moesaic_", "moesaic_model_")}
    groups |= {"moesaic_gateway_": [], "vllm:": [], "tgi_": []}
    for name, about in re.findall(r"^# HELP (\S+) (.*)", text, re.M):
        if not name.endswith("_created"):
            prefix = max((prefix for prefix in groups if name.startswith(prefix)), key=len)
            groups[prefix].append((f"`{name}`", kinds[name], about))
    headings = {
        "moesaic_": "Names of Moesaic",
        "moesaic_model_": "Servers only",
        "moesaic_gateway_": "Gateways only",
        "vllm:": "Names of vLLM",
        "tgi_": "Names of TGI",
    }
    parts = [
        "`GET /metrics` returns these in Prometheus' text format. [Observe](../how-to/observe.md) says how to use them."
    ]
    for prefix, rows in groups.items():
        parts += [f"## {headings[prefix]}", table(("name", "type", "meaning"), rows)]
    return page("Metrics", *parts)
