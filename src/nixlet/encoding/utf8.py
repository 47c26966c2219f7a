"""Text that came as bytes."""


def is_valid(text: str) -> bool:
    """Whether text from the command line or the environment was UTF-8; what wasn't, Python keeps in surrogates (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
