"""``python -m torchqat``: what a build script asks the installed package."""

import argparse

import torchqat


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m torchqat", description=torchqat.__doc__)
    questions = parser.add_mutually_exclusive_group(required=True)
    questions.add_argument(
        "--cmake-prefix-path",
        action="store_const",
        const=torchqat.cmake_prefix_path,
        dest="answer",
        help="print the CMAKE_PREFIX_PATH for find_package(TorchQAT): where torchqat and torch are",
    )
    questions.add_argument(
        "--version",
        action="store_const",
        const=torchqat.__version__,
        dest="answer",
        help="print the version of torchqat",
    )
    print(parser.parse_args().answer)


if __name__ == "__main__":
    main()
