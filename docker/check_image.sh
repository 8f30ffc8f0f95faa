#!/usr/bin/env bash
# Builds the Dockerfile and tries the image, without Docker, a daemon or a container registry: make image-check
#
# Debian's buildah builds with chroot isolation, on a Debian made by debootstrap; both need root. TensorFlow comes without
# NVIDIA's libraries, which changes the size of the image and nothing that is tried here. Packages come from where this
# machine's apt and pip take them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=${IMAGE_CHECK_FOLDER:-/var/tmp/vgg-image-check}  # the base and the layers, kept for the next time
SUITE=${IMAGE_CHECK_SUITE:-bookworm}
USER_ID=12345  # in no list of users, as with docker run --user
TESTS=(tests/test_devices.py tests/test_model.py)
STORE=(--root "$FOLDER/store" --runroot "$FOLDER/run")
MOUNTS=()

fail() { echo "error: $*" >&2; exit 2; }
step() { echo "[$((SECONDS / 60))m$((SECONDS % 60))s] $*"; }
in_store() { buildah "${STORE[@]}" "$@"; }
size_of() { in_store images --format '{{.Size}}' "$1"; }

# run USER COMMAND...: in the container, with MOUNTS
run() { in_store run --isolation chroot --user "$1" "${MOUNTS[@]}" "$container" -- "${@:2}"; }

# app COMMAND...: as `docker run --user` does, through the image's entrypoint
app() { run "$USER_ID:$USER_ID" "${entrypoint[@]}" "$@"; }

for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || fail "$tool is missing: apt-get install buildah debootstrap (Debian, Ubuntu)"
done
[ "$(id -u)" = 0 ] || fail "buildah with chroot isolation and debootstrap need root: sudo make image-check"
mkdir -p "$FOLDER"
exec 9>"$FOLDER/lock"
flock -n 9 || fail "another image-check is running in $FOLDER"
container=
trap '[ -z "$container" ] || in_store rm "$container" >/dev/null; rm -rf "$FOLDER/try" "$FOLDER/debian"' EXIT

# How this machine's pip reaches its registry.
registry=()
for path in /etc/pip.conf /etc/ssl/certs; do
  [ ! -e "$path" ] || registry+=(--volume "$path:$path:ro")
done

if ! in_store inspect --type image "localhost/debian:$SUITE" >/dev/null 2>&1; then
  step "making a Debian $SUITE with debootstrap"
  rm -rf "$FOLDER/debian"
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$SUITE" "$FOLDER/debian" \
    >"$FOLDER/debootstrap.log" 2>&1 || fail "debootstrap failed: $(tail -n 1 "$FOLDER/debootstrap.log")"
  rm -rf "$FOLDER/debian/var/cache/apt" "$FOLDER/debian/var/lib/apt/lists"
  container=$(in_store from scratch)
  in_store add --quiet "$container" "$FOLDER/debian" / >/dev/null
  in_store commit --quiet --rm "$container" "localhost/debian:$SUITE" >/dev/null
  container=
  rm -rf "$FOLDER/debian"
fi

step "building the Dockerfile"
in_store build --isolation chroot --layers "${registry[@]}" --tag localhost/vgg19 \
  --build-arg "BASE_IMAGE=localhost/debian:$SUITE" --build-arg TENSORFLOW=tensorflow . >"$FOLDER/build.log" 2>&1 ||
  fail "the build failed: $FOLDER/build.log: $(tail -n 1 "$FOLDER/build.log")"
step "built: $(size_of localhost/vgg19), of which the base is $(size_of "localhost/debian:$SUITE")"

container=$(in_store from --pull-never localhost/vgg19)
list='{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}'
mapfile -t entrypoint < <(in_store inspect --format "$list" "$container" | sed '/^$/d')
mkdir -p "$FOLDER"/try/{data,checkpoints,features}
chown "$USER_ID:$USER_ID" "$FOLDER"/try/*
for name in data checkpoints features; do MOUNTS+=(--volume "$FOLDER/try/$name:/app/$name"); done

step "sample photographs"
app python -m tools.sample_data data/sample
MOUNTS[1]+=:ro  # the data
step "train.py, with the ImageNet weights inside the image"
app train.py data/sample --run checkpoints/check --train-from head --epochs 2 --image-size 64 --batch-size 16
step "inference.py"
images=$(find "$FOLDER/try/data/sample/val/cat" -type f | wc -l)
app inference.py data/sample/val/cat --format json >"$FOLDER/try/predictions.jsonl"
[ "$(grep -c '"predictions"' "$FOLDER/try/predictions.jsonl")" = "$images" ] || fail "inference.py left images out"
step "export.py"
app export.py --format saved_model checkpoints/check/serving/1
[ -f "$FOLDER/try/checkpoints/check/serving/1/saved_model.pb" ] || fail "export.py wrote no saved_model.pb"
step "tensorboard --version"
app tensorboard --version
foreign=$(find "$FOLDER/try/checkpoints" "$FOLDER/try/features" ! -user "$USER_ID" | head -n 1)
[ -z "$foreign" ] || fail "$foreign does not belong to the user that the container ran as"

step "tests: ${TESTS[*]}"
MOUNTS=("${registry[@]}" --volume "$PWD/tests:/app/tests:ro" --volume "$PWD/pyproject.toml:/app/pyproject.toml:ro")
run 0:0 pip install --quiet "$(grep '^pytest>' requirements-dev.txt)" "$(grep '^scikit-learn' requirements-dev.txt)"
run "$USER_ID:$USER_ID" python -m pytest -q -p no:cacheprovider "${TESTS[@]}"

step "the image builds and works on the CPU as an unprivileged user"
echo "not checked: the GPU, and NVIDIA's libraries of tensorflow[and-cuda], which a host without one can't use"
echo "kept for the next time: $FOLDER ($(du -sh "$FOLDER" | cut -f1))"
