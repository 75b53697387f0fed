"""Many groups of ranks on a Ray cluster: `serve run deploy.ray.application:build model=FOLDER`.

A replica is a group: a placement group with a bundle for each rank, and in each bundle an actor
that runs `serving.py` as a process of the server's own environment, told of the others by
torchrun's variables. Rank 0 serves HTTP to the replica alone. Before the replicas stands a front,
which hands each request to one of them, to another when the first is lost before anything was
answered.

Runs in Ray's environment, on every node, from this folder at the same path.

Past 250 lines, since a request's way from the front to a rank is one thing to read.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import ray
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.util.metrics import Counter
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

ROOT = Path(__file__).parents[2]

ROUTERS = {
    "prefix": "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router:"
    "PrefixCacheAffinityRouter",  # its public name, in ray.serve.llm, imports vLLM or SGLang
    "load": "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter",
}

OWN_FLAGS = (
    "--model", "--repo-id-or-model-path", "--host", "--port",
    "--tensor-parallel-size", "--data-parallel-size",
)  # fmt: skip

HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "content-length",
}  # fmt: skip

SET_ANEW = {"date", "server", "x-request-id"}
"""Headers of an answer that Ray's proxy sets too; the id is the one that the server was told."""

PREFIX_CHARS = 32768
"""Of a prompt, by which the router compares it with others."""

TREE_CHARS = 4_000_000
"""That the router keeps of all replicas' prompts together."""

DRAIN_SECONDS = 600.0
"""That a replica, or a front, has to end what it runs when it is to go, in a rolling update too."""

BODY_SECONDS = 60.0
POLL_SECONDS = 0.5
FIRST_PAUSE, LAST_PAUSE = 0.25, 4.0


class Settings(BaseModel):
    """What `serve run` and a config file's `args` may say.

    Attributes:
        model: folder of the model, the same on all nodes.
        python: interpreter of the server's environment.
        num_ranks: of a group.
        cpus_per_rank, gpus_per_rank: what a bundle holds.
        placement: STRICT_PACK keeps a group on one node; PACK and SPREAD let it span several.
        min_replicas, max_replicas: groups that there are.
        target_ongoing_requests: of a group, on average; more of them call for another group.
        max_ongoing_requests: that a group is given at once.
        max_queued_requests: that wait in each front; further ones get 503.
        upscale_delay_s, downscale_delay_s: how long the load must ask for more groups, or fewer.
        router: `prefix` goes where a prompt's beginning went, `load` to the less busy of two.
        imbalance: requests by which one group may be ahead of another before `prefix` gives way.
        num_fronts: processes that read requests and hand them on.
        start_seconds: in which a group must be ready.
        retry_seconds: for which a request seeks a group that answers.
        max_body_size: bytes of a request.
        server_flags: further flags of serving.py.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "demo_model"
    python: str = str(ROOT / ".venv/bin/python")
    num_ranks: PositiveInt = 1
    cpus_per_rank: PositiveFloat = 1.0
    gpus_per_rank: Literal[0, 1] = 0
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 8
    max_ongoing_requests: PositiveInt = 16
    max_queued_requests: PositiveInt = 1024
    upscale_delay_s: PositiveFloat = 10
    downscale_delay_s: PositiveFloat = 300
    router: Literal["prefix", "load"] = "prefix"
    imbalance: PositiveInt = 8
    num_fronts: PositiveInt = 1
    start_seconds: PositiveFloat = 1200
    retry_seconds: PositiveFloat = 120
    max_body_size: PositiveInt = Field(default=32 * 2**20)
    server_flags: str = ""

    @field_validator("gpus_per_rank", mode="before")
    @classmethod
    def _read_count(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @field_validator("server_flags")
    @classmethod
    def _check_flags(cls, value: str) -> str:
        taken = [word for word in shlex.split(value) if word.partition("=")[0] in OWN_FLAGS]
        if taken:
            raise ValueError(f"{taken[0]} is set by the application: leave it out of server_flags")
        return value


@dataclass(frozen=True)
class Message:
    """A request on its way from a front to a group.

    Attributes:
        prompt: what Ray's prefix-aware router compares with others; it finds it by this name.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    prompt: str


@dataclass(frozen=True)
class AnswerStart:
    status: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Seat:
    """Where a rank's bundle lies: its node, what that lets it use, and two ports free there."""

    node: str
    address: str
    cards: tuple[str, ...]
    ports: tuple[int, int]


class GroupLost(RuntimeError):
    """A group cannot answer; another may."""


@ray.remote(max_restarts=0)
class Rank:
    """One rank, as a process; it ends with this actor, and the actor with its replica."""

    def find_seat(self) -> Seat:
        with socket.socket() as first, socket.socket() as second:
            for one in (first, second):
                one.bind(("", 0))
            ports = (first.getsockname()[1], second.getsockname()[1])
        context = ray.get_runtime_context()
        cards = tuple(context.get_accelerator_ids().get("GPU", ()))
        return Seat(context.get_node_id(), ray.util.get_node_ip_address(), cards, ports)

    def start(self, command: list[str], own: dict[str, str]) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # Of Ray's own for Intel cards, which would hide the other ranks' cards.
        environ.pop("ONEAPI_DEVICE_SELECTOR", None)
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=environ | own, cwd=ROOT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        return self._process.poll()


def tell_ranks(seats: list[Seat]) -> list[dict[str, str]]:
    """Each rank's variables: who it is, where rank 0 is, and which cards its node's ranks share."""
    nodes = [seat.node for seat in seats]
    is_one_node = len(set(nodes)) == 1
    told = []
    for rank, seat in enumerate(seats):
        own = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(nodes[:rank].count(seat.node)),
            "LOCAL_WORLD_SIZE": str(nodes.count(seat.node)),
            "MASTER_ADDR": "127.0.0.1" if is_one_node else seats[0].address,
            "MASTER_PORT": str(seats[0].ports[1]),
        }
        cards = [card for one in seats if one.node == seat.node for card in one.cards]
        if cards:
            own |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"), ",".join(cards))
        told.append(own)
    return told


class Group:
    """A replica: starts its ranks in its bundles, and passes requests on to rank 0."""

    async def __init__(self, settings: Settings) -> None:
        group = ray.util.get_current_placement_group()
        share = {"num_cpus": settings.cpus_per_rank, "num_gpus": settings.gpus_per_rank}
        self._ranks = [
            Rank.options(
                **share, scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)
            ).remote()
            for bundle in range(settings.num_ranks)
        ]
        seats = await asyncio.gather(*(rank.find_seat.remote() for rank in self._ranks))
        port = seats[0].ports[0]
        command = [
            settings.python, "serving.py", "--model", settings.model,
            "--host", "127.0.0.1", "--port", str(port), *shlex.split(settings.server_flags),
        ]  # fmt: skip
        await asyncio.gather(
            *(
                rank.start.remote(command, own)
                for rank, own in zip(self._ranks, tell_ranks(seats), strict=True)
            )
        )
        self._session = aiohttp.ClientSession(
            f"http://127.0.0.1:{port}",
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
        )
        deadline = time.monotonic() + settings.start_seconds
        while not await self._is_ready():
            if time.monotonic() > deadline:
                raise GroupLost(f"the ranks were not ready after {settings.start_seconds:.0f} s")
            await asyncio.sleep(POLL_SECONDS)

    async def _is_ready(self) -> bool:
        await self._check_ranks()
        try:
            async with self._session.get("/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def _check_ranks(self) -> None:
        codes = await asyncio.gather(*(rank.poll.remote() for rank in self._ranks))
        for rank, code in enumerate(codes):
            if code is not None:
                raise GroupLost(f"rank {rank} has ended with exit code {code}: its log tells why")

    async def check_health(self) -> None:
        """Asked by Ray Serve; a replica that raises is replaced."""
        await self._check_ranks()
        async with self._session.get("/health") as answer:
            if answer.status != 200:
                raise GroupLost(f"/health answers {answer.status}: {await answer.text()}")

    async def forward(self, message: Message) -> AsyncIterator[AnswerStart | bytes]:
        """Pass a request on.

        Yields:
            Status and headers, then pieces of the body. What is no stream comes whole, so that
            nothing has been sent yet if the group is lost on the way.

        Raises:
            GroupLost: the group is gone, or takes nothing.
        """
        try:
            async with self._session.request(
                message.method, message.target, headers=message.headers, data=message.body,
                allow_redirects=False,
            ) as answer:  # fmt: skip
                start = AnswerStart(
                    answer.status, keep_headers(answer.headers.items(), HOP_BY_HOP | SET_ANEW)
                )
                if answer.status == 503 and message.method == "POST":  # others ask how it is
                    raise GroupLost((await answer.text())[:1000])
                whole = await answer.read() if answer.content_length is not None else None
                yield start
                if whole is not None:
                    yield whole
                    return
                async for piece in answer.content.iter_any():
                    yield piece
        except aiohttp.ClientError as error:
            raise GroupLost(f"{type(error).__name__}: {error}") from error


def keep_headers(headers: Any, without: set[str] = HOP_BY_HOP) -> tuple[tuple[str, str], ...]:
    """Those that are to be passed on."""
    return tuple((name, value) for name, value in headers if name.lower() not in without)


def find_prompt(target: str, body: bytes) -> str:
    """What stands at the beginning of a request's prompt, tools first, as templates have it."""
    try:
        fields = json.loads(body) if body else None
    except (ValueError, RecursionError):
        fields = None
    parts = [target]
    if isinstance(fields, dict):
        for name in ("tools", "system", "instructions", "messages", "prompt", "input"):
            if fields.get(name) is not None:
                parts.append(json.dumps(fields[name], ensure_ascii=False))
    return "\n".join(parts)[:PREFIX_CHARS]


def refuse(status: int, message: str) -> Response:
    """An error in OpenAI's form."""
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse({"error": error}, status, headers)


class Front:
    """Reads requests and hands each to a group, by Ray's router."""

    def __init__(self, groups: Any, settings: Settings) -> None:
        self._groups = groups.options(stream=True)
        self._settings = settings
        self._num_retries = Counter(
            "autotp_retries", "Requests given to another group since one was lost."
        )

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/metrics":
            return refuse(404, "each group has its own /metrics, and Ray those of its replicas")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read_body(request)
        except TimeoutError:
            return refuse(408, f"the body did not arrive within {BODY_SECONDS:.0f} s")
        except ClientDisconnect:
            return Response(status_code=400)
        if body is None:
            return refuse(413, f"the body has more than {self._settings.max_body_size} bytes")
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        message = Message(
            request.method,
            target,
            keep_headers(request.headers.items()),
            body,
            find_prompt(target, body),
        )
        return await self._answer(message)

    async def _read_body(self, request: Request) -> bytes | None:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._settings.max_body_size:
                return None
        return bytes(body)

    async def _answer(self, message: Message) -> Response:
        deadline = time.monotonic() + self._settings.retry_seconds
        pause, num_retries = FIRST_PAUSE, 0
        while True:
            pieces = self._groups.forward.remote(message)
            try:
                start = await anext(pieces)
                break
            except BackPressureError as error:
                return refuse(503, str(error))
            except (RayActorError, DeploymentUnavailableError, GroupLost) as error:
                if time.monotonic() + pause > deadline:
                    return refuse(503, f"no group answers: {error}")
            num_retries += 1
            self._num_retries.inc()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        response = StreamingResponse(pieces, start.status)
        for name, value in start.headers:
            response.headers.append(name, value)
        if num_retries:
            response.headers["X-Retries"] = str(num_retries)
        return response


def build(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and config files.

    Args:
        args: see Settings.

    Raises:
        pydantic.ValidationError: a name or value that Settings does not know.
    """
    settings = Settings(**args)
    bundle = {"CPU": settings.cpus_per_rank}
    if settings.gpus_per_rank:
        bundle["GPU"] = settings.gpus_per_rank
    router = {}
    if settings.router == "prefix":
        router = {
            "imbalanced_threshold": settings.imbalance,
            "do_eviction": True,
            "eviction_threshold_chars": TREE_CHARS,
            "eviction_target_chars": TREE_CHARS * 9 // 10,
        }
    groups = serve.deployment(
        Group,
        name="Group",
        ray_actor_options={"num_cpus": 0},  # the bundles are the ranks'
        placement_group_bundles=[bundle] * settings.num_ranks,
        placement_group_strategy=settings.placement,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing_requests,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTERS[settings.router], request_router_kwargs=router
        ),
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    front = serve.deployment(
        Front,
        name="Front",
        num_replicas=settings.num_fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
    )
    return front.bind(groups.bind(settings), settings)
