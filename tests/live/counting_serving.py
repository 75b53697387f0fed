"""serving.py that also tells what it keeps of its clients, at /kept. Every rank.

Nothing of the product knows of it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
from typing import Any

import serving
from autotp_serving.api import app as api_app


def main() -> int:
    """Serve."""
    build = api_app.build_app

    def build_counting(engine: Any, *rest: Any) -> Any:
        app = build(engine, *rest)

        @app.get("/kept")
        async def kept() -> dict[str, int]:
            """Everything that must be as before once all clients are gone."""
            gc.collect()
            scheduler = engine.engine.scheduler
            return {
                "tasks": len(asyncio.all_tasks()),
                "objects": len(gc.get_objects()),
                "threads": threading.active_count(),
                "files": len(os.listdir("/proc/self/fd")),
                "streams": engine.num_open,
                "sequences": len(scheduler.running) + len(scheduler.waiting),
                "blocks": scheduler.blocks.num_held,
            }

        return app

    api_app.build_app = build_counting
    return serving.main()


if __name__ == "__main__":
    sys.exit(main())
