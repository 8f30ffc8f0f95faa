"""What a user of Keras writes to predict photographs: python tools/keras_predict.py MODEL IMAGE|FOLDER.

Nothing of this project is in it: tools.benchmark measures inference.py against it.
"""

import json
import os
import sys

import keras


def main(model_file: str, images: str) -> None:
    """Prints a JSON object for each photograph."""
    model = keras.models.load_model(model_file)
    size = model.input_shape[1:3]
    if os.path.isdir(images):
        photographs = keras.utils.image_dataset_from_directory(
            images, labels=None, shuffle=False, image_size=size, batch_size=32, verbose=False
        )
        names = photographs.file_paths
        probabilities = model.predict(photographs.map(keras.applications.vgg19.preprocess_input), verbose=0)
    else:
        names = [images]
        photograph = keras.utils.img_to_array(keras.utils.load_img(images, target_size=size))
        probabilities = model.predict(keras.applications.vgg19.preprocess_input(photograph[None]), verbose=0)
    for name, row in zip(names, probabilities, strict=True):
        print(json.dumps({"image": name, "class": int(row.argmax()), "probability": float(row.max())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
