"""Jupyter's messages, packed and read with no more work than they need. In the kernel and in the pool."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Sequence
from typing import Any

from jupyter_client.session import DELIM, Session, extract_header


class LeanSession(Session):
    """jupyter_client's session, for short messages.

    It does not pack again and again what all answers to a request repeat, and leaves dates as the text that they
    are; both took more time than all else.
    """

    _parent: object = None
    _packed_parent = b"{}"

    def send(
        self, stream: Any, msg_or_type: Any, content: Any = None, parent: Any = None, *args: Any, **kw: Any
    ):
        ident = args[0] if args else kw.pop("ident", None)
        if not isinstance(msg_or_type, str) or any(args[1:]) or any(kw.values()) or os.getpid() != self.pid:
            return super().send(stream, msg_or_type, content, parent, ident, *args[1:], **kw)
        if parent is not self._parent:
            self._parent, self._packed_parent = parent, self.pack(extract_header(parent or {}))
        parts = [
            self.pack(self.msg_header(msg_or_type)),
            self._packed_parent,
            b"{}",
            self.pack(content or {}),
        ]
        identities = ident if isinstance(ident, list) else [ident] if ident else []
        stream.send_multipart([*identities, DELIM, self.sign(parts), *parts])
        return None

    def read(self, frames: Sequence[bytes]) -> tuple[list[bytes], dict[str, Any]]:
        """
        Returns:
            The identities before a message, and the message as `deserialize` gives it, but for dates.

        Raises:
            ValueError, LookupError, TypeError, RecursionError: it is none, or not signed with the key.
        """
        end = frames.index(DELIM)
        signature, *parts = frames[end + 1 :]
        if not hmac.compare_digest(self.sign(parts[:4]), signature):
            raise ValueError("a message with a wrong signature")
        header, parent_header, metadata, content = map(json.loads, parts[:4])
        return list(frames[:end]), {
            "header": header,
            "msg_id": header["msg_id"],
            "msg_type": header["msg_type"],
            "parent_header": parent_header,
            "metadata": metadata,
            "content": content,
            "buffers": [memoryview(buffer) for buffer in parts[4:]],
        }
