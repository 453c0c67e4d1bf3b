"""`python -m advtransfer`, which is the command `advtransfer`."""

from advtransfer.main import run

if __name__ == "__main__":
    run()
