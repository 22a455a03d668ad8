"""The options that several commands take, each defined once: its type, its words in `--help`, what it must be."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="Hugging Face hub id, checkpoint folder, or name of a shipped model.", show_default="the shipped model"
    ),
]
Column = Annotated[
    str | None, typer.Option(help="Column with the texts or token ids.", show_default="text, or input_ids")
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Most tokens in a sequence.", show_default="what the model allows")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Most sequences in a batch.", show_default="chosen by their lengths")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Most sequences to read.", show_default="all")]
Device = Annotated[str | None, typer.Option(help="For example cpu or cuda:0.", show_default="cuda where there is one")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16 or float64.", show_default="the checkpoint's")
]
Resume = Annotated[
    bool, typer.Option("--resume/--fresh", help="Go on with an earlier start in the same folder, or start it again.")
]
