"""Stream several answers of a server concurrently, and stop each one after its first sentence.

moesaic serve &
python examples/client_stream_async.py
"""

import asyncio

from moesaic.client import AsyncClient


async def first_sentence(client: AsyncClient, subject: str) -> str:
    async with client.chat(f"Tell me a story about a {subject}.", max_tokens=200, seed=1, stream=True) as stream:
        async for piece in stream:
            if "." in piece.text:
                break
        return stream.text.partition(".")[0] + "."  # leaving the context stops the generation


async def main() -> None:
    async with AsyncClient() as client:
        for sentence in await asyncio.gather(
            *(first_sentence(client, subject) for subject in ("rabbit", "king", "fox"))
        ):
            print(sentence.strip())


asyncio.run(main())
