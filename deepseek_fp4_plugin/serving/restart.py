"""`--restart_on_failure`: an engine that has stopped is started again, workers and all."""

import logging
import threading

from deepseek_fp4_plugin.llm import LLM

logger = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between two looks at the engine
_LONGEST_PAUSE = 60.0  # seconds between two attempts that failed; the first pause is one second


class Restarter:
    """A thread that watches an LLM until `stop`. Meanwhile /health says 503 and why."""

    def __init__(self, llm: LLM):
        self._llm, self._stopped = llm, threading.Event()
        threading.Thread(target=self._run, name="restart-on-failure", daemon=True).start()

    def stop(self) -> None:
        """No new attempt; one under way is cut short by `LLM.shutdown`."""
        self._stopped.set()

    def _run(self) -> None:
        pause = 1.0
        while not self._stopped.wait(_LOOK):
            try:
                self._llm.check_health()
                pause = 1.0
                continue
            except RuntimeError as failure:
                logger.warning("starting again: %s", failure)
            try:
                self._llm.restart()
                logger.info("serving again")
            except Exception as error:
                if not self._stopped.is_set():
                    logger.error("starting again failed: %s; the next attempt is in %.0f s", error, pause)
                self._stopped.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
