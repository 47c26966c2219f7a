"""Why JSON that others wrote, or a disk kept, can't be read."""

import msgspec

#: What msgspec raises for it: where it is no JSON or of another form, has texts that are no UTF-8, or is nested too deep.
JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
