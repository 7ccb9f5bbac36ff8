"""The program of ChatRenderer's process: renders chat templates that come in on stdin. It imports nothing of lockstep.

A job is 8 bytes of length and JSON; so is an answer, {"text"} or {"error"}. The environment is the one that
transformers gives chat templates.
"""

import contextlib
import functools
import json
import resource
import sys
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what an assistant wrote; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012  as Jinja has it

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def compiled(template):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)


def render(job):
    now = job["now"]

    def strftime_now(pattern):
        return (datetime.fromisoformat(now) if now is not None else datetime.now()).strftime(pattern)

    parts, size = [], 0
    for part in compiled(job["template"]).generate(strftime_now=strftime_now, **job["variables"]):
        parts.append(part)
        size += len(part)
        if size > job["limit"]:
            return {"error": f"it writes more than {job['limit']} characters"}
    return {"text": "".join(parts)}


def answer(job):
    try:
        return render(job)
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it nests without end"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:  # whatever the template does is its own error
        return {"error": f"{type(error).__name__}: {error}"[:500].replace("\n", " ")}


def limit_this_process(memory_bytes):
    limits = {"RLIMIT_AS": memory_bytes, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 32}
    for name, limit in limits.items():
        # macOS knows some of them by name alone
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def main():
    limit_this_process(int(sys.argv[1]))
    read, write = sys.stdin.buffer, sys.stdout.buffer
    compiled("{{ 1 }}").render()
    write.write(bytes(8))
    write.flush()
    while len(size := read.read(8)) == 8:
        reply = json.dumps(answer(json.loads(read.read(int.from_bytes(size, "little"))))).encode()
        write.write(len(reply).to_bytes(8, "little") + reply)
        write.flush()


if __name__ == "__main__":
    main()
