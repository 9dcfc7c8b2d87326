"""`python -m trajrec`: the `trajrec` command, where its script is not on the path."""

from trajrec.cli.main import main

if __name__ == "__main__":
    main()
