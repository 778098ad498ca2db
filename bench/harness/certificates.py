"""Certificates for the relays under TLS, made anew for each run with openssl. Owns where their files are."""

import os
import subprocess

from .processes import Trouble

KEYS = {
    "ec": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "rsa": ("-newkey", "rsa:2048"),
}


def make(directory):
    """One self-signed certificate for each kind of key."""
    for kind in KEYS:
        chain, key, both = files(directory, kind)
        command = ["openssl", "req", "-x509", *KEYS[kind], "-nodes", "-keyout", key, "-out", chain, "-days", "2",
                   "-subj", "/CN=bench", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Trouble("there is no openssl to make certificates with: apt-get install openssl") from error
        except subprocess.CalledProcessError as error:
            raise Trouble(f"openssl made no certificate: {error.stderr.strip()}") from error
        with open(both, "w") as to:
            for path in (chain, key):
                with open(path) as part:
                    to.write(part.read())


def files(directory, kind):
    """Chain, key, and both in one file, as HAProxy wants them."""
    return tuple(os.path.join(directory, f"{kind}.{end}") for end in ("pem", "key", "both"))
