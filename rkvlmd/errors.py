"""Every error that a user can meet, each with a stable code.

The table below is the one place that says which HTTP status and which OpenAI
error type belong to a code. Messages never hold paths, addresses or the text
of a library's exception.
"""

from __future__ import annotations

CODES: dict[str, tuple[int, str]] = {
    # what the client sent
    "invalid_request": (400, "invalid_request_error"),
    "invalid_json": (400, "invalid_request_error"),
    "unsupported_parameter": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "too_many_images": (400, "invalid_request_error"),
    "invalid_image": (400, "invalid_request_error"),
    "invalid_image_format": (400, "invalid_request_error"),
    "invalid_base64_image": (400, "invalid_request_error"),
    "invalid_image_url": (400, "invalid_request_error"),
    "image_too_large": (400, "invalid_request_error"),
    "image_too_small": (400, "invalid_request_error"),
    "image_parse_error": (400, "invalid_request_error"),
    "image_file_too_large": (400, "invalid_request_error"),
    "empty_image_file": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "host_not_allowed": (403, "permission_error"),
    "model_not_found": (404, "not_found_error"),
    "not_found": (404, "not_found_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "failed_to_download_image": (422, "invalid_request_error"),
    # what happened to the job
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "client_gone": (499, "invalid_request_error"),
    "cancelled": (499, "invalid_request_error"),
    "server_error": (500, "server_error"),
    "engine_died": (500, "server_error"),
    "engine_wedged": (500, "server_error"),
    "engine_crash": (500, "server_error"),
    "engine_error": (500, "server_error"),
    "invalid_model": (500, "server_error"),
    # what the server cannot do now
    "server_is_overloaded": (503, "service_unavailable_error"),
    "model_loading": (503, "service_unavailable_error"),
    "model_not_loaded": (503, "service_unavailable_error"),
    "model_unloaded": (503, "service_unavailable_error"),
    "model_failed": (503, "service_unavailable_error"),
    "model_pinned": (503, "service_unavailable_error"),
    "insufficient_memory": (503, "service_unavailable_error"),
    "draining": (503, "service_unavailable_error"),
    "shutting_down": (503, "service_unavailable_error"),
    "deadline_exceeded": (504, "server_error"),
}


class RkvlmdError(Exception):
    """An error with a code from ``CODES``.

    Args:
      code: a key of ``CODES``.
      message: one plain sentence for the client; no paths, no addresses.
      param: the JSON path of the field at fault, for example
        ``messages[0].content[1].image_url``.
      retry_after: seconds after which a retry makes sense (1 to 120).
      should_retry: what ``x-should-retry`` tells the client, or ``None``.

    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry

    @property
    def status(self) -> int:
        """The HTTP status, from ``CODES``."""
        return CODES[self.code][0]

    @property
    def type(self) -> str:
        """The OpenAI error type, from ``CODES``."""
        return CODES[self.code][1]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.code!r}, {self.message!r}, param={self.param!r})"


class SettingsError(Exception):
    """The settings are wrong; ``problems`` lists every one with its key."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class StartError(Exception):
    """The daemon cannot start here; the message is one sentence for the owner, without a trace."""


class ManifestError(Exception):
    """A model folder is wrong; ``problems`` lists every one with its key."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__(f"model {name!r}: " + "; ".join(problems))
        self.name = name
        self.problems = problems
