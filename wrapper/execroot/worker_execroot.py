"""A directory of one worker's own, in which one action after the other appears under the same paths.

For a singleplex tool that does not know `sandbox_dir`: the worker runs in its own execroot, and the
content of the request's sandbox is moved there and back (rename of the top-level entries: real and
stable paths, the same cost whatever the number of files). While idle it shows links to what the host's
execroot holds, so that a tool that lies there can be started and can load what it loads late.

Everything is done by descriptor, without following links in what a request names.
"""

from __future__ import annotations

import errno
import os

from wrapper.errors import RequestRefused, RuntimeUnavailable

FOLDER = "__nlww_execroots"
"""Under the host's execroot, and so on the same mount as the sandboxes that Bazel makes there."""
_NOT_SEEDED = {FOLDER, "__sandbox"}
_ATTEMPTS = 10
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class WorkerExecroot:
    """One worker's execroot. `path` never changes, nor does its inode."""

    def __init__(self, host: str, path: str) -> None:
        self.path = path
        self._host = host
        self._fd = os.open(path, _DIRECTORY)

    @classmethod
    def make(
        cls, host: str, worker_id: int, *, uid: int | None = None, gid: int | None = None
    ) -> WorkerExecroot:
        """A new one for this worker under `host`, the execroot that its host runs in. Raises OSError.

        `uid`, `gid`: of the worker, if that is not our own.
        """
        parent = os.path.join(host, FOLDER)
        path = os.path.join(parent, f"{os.getpid()}-{worker_id}")
        for attempt in range(_ATTEMPTS):
            os.makedirs(parent, mode=0o700, exist_ok=True)
            try:
                os.mkdir(path, 0o700)
                break
            except FileNotFoundError:  # another wrapper, in the same directory, has removed its last one
                if attempt == _ATTEMPTS - 1:
                    raise
        execroot = cls(host, path)
        try:
            if uid is not None and uid != os.geteuid():
                # On the way to its own execroot it passes here, and sees nothing of the others'.
                os.chmod(parent, 0o711)  # noqa: S103
                os.fchown(execroot._fd, uid, -1 if gid is None else gid)
            execroot._seed()
        except BaseException:
            execroot.remove()
            raise
        return execroot

    def stage(self, sandbox_dir: bytes) -> StagedSandbox:
        """Move the sandbox's content in. Raises RequestRefused if the sandbox is not one.

        RuntimeUnavailable: what the tool left here cannot be removed, and the worker must not go on.
        On any error the sandbox's content is where it was.
        """
        sandbox_fd = self._open_sandbox(sandbox_dir)
        try:
            self._unseed()
        except OSError as error:
            os.close(sandbox_fd)
            raise RuntimeUnavailable(
                f"the worker's execroot {self.path} cannot be emptied: {error}"
            ) from error
        except BaseException:
            os.close(sandbox_fd)
            raise
        staged = StagedSandbox(self, sandbox_fd)
        try:
            move_entries(sandbox_fd, self._fd)
        except OSError as error:
            staged.undo()
            hint = " (it is on another filesystem or mount)" if error.errno == errno.EXDEV else ""
            raise RequestRefused(
                f"sandbox_dir {os.fsdecode(sandbox_dir)!r} cannot be moved into the worker's execroot: "
                f"{error}{hint}; a tool that knows sandbox_dir needs --tool-sandbox"
            ) from error
        except BaseException:
            staged.undo()
            raise
        return staged

    def give_back(self, sandbox_fd: int) -> None:
        """Move everything that is in the execroot to the sandbox, and show the host's links again."""
        move_entries(self._fd, sandbox_fd)
        self._seed()

    def remove(self) -> None:
        """Delete the execroot. Idempotent; quiet about what is gone already."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        import shutil  # 6 ms, and most wrappers never come here

        shutil.rmtree(self.path, ignore_errors=True)
        try:
            os.rmdir(os.path.dirname(self.path))
        except OSError:
            pass  # other workers' execroots are there

    def _open_sandbox(self, sandbox_dir: bytes) -> int:
        parts = [part for part in sandbox_dir.split(b"/") if part not in (b"", b".")]
        if sandbox_dir.startswith(b"/") or b".." in parts or not parts:
            raise RequestRefused(
                f"sandbox_dir {os.fsdecode(sandbox_dir)!r} is not a path below the worker's working directory"
            )
        fd = os.open(self._host, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError as error:
            os.close(fd)
            raise RequestRefused(
                f"sandbox_dir {os.fsdecode(sandbox_dir)!r} cannot be opened below {self._host}: {error}"
            ) from error
        return fd

    def _seed(self) -> None:
        for name in os.listdir(self._host):
            if name not in _NOT_SEEDED:
                os.symlink(os.path.join(self._host, name), name, dir_fd=self._fd)

    def _unseed(self) -> None:
        """Empty it: our links, and what the tool may have left there while it was idle."""
        for name in os.listdir(self._fd):
            try:
                os.unlink(name, dir_fd=self._fd)
            except IsADirectoryError:
                import shutil

                shutil.rmtree(name, dir_fd=self._fd)


class StagedSandbox:
    """A sandbox whose content is in a worker's execroot now."""

    def __init__(self, execroot: WorkerExecroot, sandbox_fd: int) -> None:
        self._execroot = execroot
        self._fd = sandbox_fd

    def collect(self) -> None:
        """Give the sandbox its content back, with whatever the worker added. Raises RuntimeUnavailable."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            self._execroot.give_back(fd)
        except OSError as error:
            raise RuntimeUnavailable(
                f"the outputs of a sandboxed request cannot be given back: {error}"
            ) from error
        finally:
            os.close(fd)

    def undo(self) -> bool:
        """As `collect`, quietly: for a request that was never sent, so that nothing is new there."""
        try:
            self.collect()
        except RuntimeUnavailable:
            return False  # the error that led here is the one to tell
        return True

    def abandon(self) -> None:
        """Give nothing back: the worker died with it, and its execroot goes with the worker."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def move_entries(source_fd: int, target_fd: int) -> None:
    """Rename every entry of one directory into another. Raises OSError, with some of them moved."""
    for name in os.listdir(source_fd):
        os.rename(name, name, src_dir_fd=source_fd, dst_dir_fd=target_fd)
