"""`python -m layer_surgery` is `layer-surgery`."""

from layer_surgery.cli.main import main

if __name__ == "__main__":
    main()
