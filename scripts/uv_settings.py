"""Prints what pip is configured to use as uv's environment variables: uv reads no pip.conf.

Reads `pip config list`. Runs on whatever Python has pip, so its syntax stays old.
"""

import ast
import os
import sys

# pip's option: uv's variable and what separates its values.
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}

settings = dict(line.strip().partition("=")[::2] for line in sys.stdin)
for option, (variable, separator) in VARIABLES.items():
    words = []
    for section in ("global", "install", ":env:"):  # the last one wins, as with pip
        text = settings.get(section + "." + option)
        words = words if text is None else ast.literal_eval(text).split()
    if words and variable not in os.environ:
        print(variable, separator.join(words), sep="=")
