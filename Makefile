# Everything happens in .venv and build/ of this checkout; each target can be run again and does what is left to do.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo distill-demo test faults bench kernels-report format build clean

PYTHON_IN_VENV := .venv/bin/python
DEMO := examples/train_classifier.py --dataset digits --weight-bits 1 --act-bits 2 --out runs/demo --overwrite
DISTILL_DEMO := examples/distill_classifier.py --dataset digits --labelled 100 --teacher-labelled 100 --seeds 0 1 2 \
  --threads 1 --out runs/distill-demo --overwrite

help:  ## say what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

demo: build  ## set up, build, train a network with 1-bit weights and 2-bit activations
	$(PYTHON_IN_VENV) $(DEMO)

distill-demo: build  ## set up, build, teach such a network by a float one, with few labels and with none
	$(PYTHON_IN_VENV) $(DISTILL_DEMO)

test:  ## set up, build, run all tests: Python, C++, emulated kernels
	@scripts/build.sh --tests
	@scripts/test.sh

faults:  ## set up, plant mistakes in the kernels one by one: do the tests find them? (ARGS="NAME... --jobs 2")
	@scripts/build.sh --packages
	$(PYTHON_IN_VENV) tests/faults/plant_faults.py $(ARGS)

bench: build  ## set up, build, run the benchmarks (ARGS="case --quick" and so on)
	$(PYTHON_IN_VENV) benchmarks/run.py $(ARGS)

kernels-report:  ## what the compiler says of the CUDA kernels, into docs/cuda_kernels.md (needs nvcc; 8 minutes of a core)
	@scripts/build.sh --kernels

format: build  ## format and lint Python, C++ and CUDA
	@scripts/format.sh

build:  ## set up the virtual environment and build the library
	@scripts/build.sh

clean:  ## remove what was built; .venv stays
	rm -rf build build-* dist python/torchqat/lib python/torchqat/include python/torchqat/_bindings*.so
