"""The command `advtransfer` in a checkout; `python launch.py --help` says how it is used."""

from advtransfer.main import run

if __name__ == "__main__":
    run()
