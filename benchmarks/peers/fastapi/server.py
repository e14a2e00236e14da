"""The peer FastAPI on uvicorn (uvloop, httptools), unbatched: JSON `{"data": [30 numbers]}`; `server.py PORT MODEL`."""

import sys

import numpy as np
import uvicorn
import xgboost
from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()
model = xgboost.Booster({"nthread": 1})
model.load_model(sys.argv[2])
model.set_param({"nthread": 1})


class Row(BaseModel):
    """What comes."""

    data: list[float]


class Answer(BaseModel):
    """What goes."""

    p: float


@app.post("/predict")
async def predict(row: Row) -> Answer:
    x = np.asarray([row.data], dtype=np.float32)
    return Answer(p=float(model.inplace_predict(x, validate_features=False)[0]))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
