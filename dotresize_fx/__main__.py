"""``python -m dotresize_fx``."""

from dotresize_fx.cli import main

if __name__ == "__main__":
    main()
