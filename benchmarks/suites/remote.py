"""An implementation in a process of its own, which times its calls itself and sleeps while it is not asked.

The thread pools of several runtimes in one process slow each other down by factors, so another runtime gets a process.
Such a process does not import PyTorch: this module and :mod:`runtimes` import it nowhere at the top.
"""

import multiprocessing
import signal
import time

import numpy as np

from .groups import LeftOut

START_SECONDS, CALL_SECONDS, END_SECONDS = 300.0, 300.0, 10.0  # time limits of a process, which may hang


class Worker:
    """A process with one function, asked for its output or for the seconds of a call.

    Args:
        name: for messages; load: picklable function of ``arguments``, called in the process, that returns a function
            from one array to another; images: its input; copies: the places in memory between which calls rotate.

    Raises:
        LeftOut: ``load`` raised it.
        RuntimeError: ``load`` raised another exception, or the process ended or did not answer. It is ended then.
    """

    def __init__(self, name, load, arguments, images, copies):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(its, load, arguments, images, copies), daemon=True)
        self._process.start()
        its.close()  # so that the end of the process is the end of the pipe
        try:
            self._answer(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _answer(self, seconds):
        try:
            if not self._pipe.poll(seconds):
                self.close()
                raise RuntimeError(f"{self.name}: its process gave no answer within {seconds:.0f} s and was ended")
            found = self._pipe.recv()
        except (EOFError, ConnectionError):
            found = self._ended()
        if isinstance(found, Exception):
            raise found
        return found

    def _ended(self):
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return RuntimeError(f"{self.name}: its process ended ({how})")

    def _call(self):
        if self._process is None:
            raise RuntimeError(f"{self.name}: its process was ended before")
        try:
            self._pipe.send(None)
        except ConnectionError:
            raise self._ended() from None
        return self._answer(CALL_SECONDS)

    def output(self):
        """The output of a call, as an array."""
        return self._call()[1]

    def turn(self):
        """The seconds of a call, measured in the process."""
        return self._call()[0]

    def close(self):
        """End the process; it returns when its pipe ends, or is killed if it does not."""
        if self._process is None:
            return
        self._pipe.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = None


def _serve(pipe, load, arguments, images, copies):
    """Answer each request by (seconds, output) of a call, until the pipe ends.

    Failures are sent as text, because their own classes may belong to a package that the other process must not import.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run ends the pipe
    try:
        function = load(*arguments)
        inputs, turn, answer = [images.copy() for _ in range(copies)], 0, None
        while True:
            pipe.send(answer)
            pipe.recv()
            turn += 1
            start = time.perf_counter()
            output = function(inputs[turn % copies])
            answer = time.perf_counter() - start, np.asarray(output)
    except (EOFError, ConnectionError):
        return
    except LeftOut as reason:
        pipe.send(reason)
    except Exception as failure:  # noqa: BLE001 - the other process raises it
        pipe.send(RuntimeError(f"{type(failure).__name__}: {failure}"))
