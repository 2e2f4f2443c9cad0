"""`python -m sharded_spd`: the command line, in the form that launchers start."""

from sharded_spd.cli import main

if __name__ == "__main__":
    main()
