"""The report's HTML as a Jinja template. Rendered with autoescape: only the plots, which the report drew, are raw."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }} · Lockstep</title>
<style>
:root { --ink: #1d2530; --soft: #66717e; --line: #e1e6eb; --paper: #f6f8fa; --good: #1c8a50; --bad: #b3402e; }
* { box-sizing: border-box; }
body, .plot svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
body { margin: 0; background: var(--paper); color: var(--ink); font-size: 15px; line-height: 1.5; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { margin: 0; font-size: 26px; letter-spacing: -0.01em; }
h2 { margin: 36px 0 12px; font-size: 18px; }
h3 { margin: 20px 0 8px; font-size: 15px; color: var(--soft); }
.sub { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)); gap: 14px;
  margin-top: 20px; }
.card, .plot, details, table { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; overflow: hidden; }
.card .title { color: var(--soft); font-size: 13px; }
.card .value { font-size: 24px; font-weight: 650; overflow-wrap: anywhere; }
.card .note { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 14px; }
.plot { padding: 10px 10px 4px; }
.plot svg { width: 100%; height: auto; display: block; }
details { margin-bottom: 8px; }
summary { cursor: pointer; padding: 9px 14px; display: flex; gap: 16px; align-items: baseline; }
summary .snippet { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.snippet, pre, .tokens, .prompt { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.body { padding: 0 14px 14px; }
.facts { color: var(--soft); font-size: 12.5px; margin: 8px 0 0; }
.facts span { margin-right: 14px; overflow-wrap: anywhere; }
.label { color: var(--soft); font-size: 12px; margin: 10px 0 3px; }
.prompt, .tokens, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 9px 11px;
  background: var(--paper); border-radius: 7px; }
pre.config { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tokens span { background: rgba(224, 122, 31, calc(var(--s) * 0.75)); border-radius: 3px; padding: 1px 0; }
.tokens .given { background: none; color: var(--soft); font-style: italic; }
.tokens.ids span { margin-right: 5px; padding: 1px 3px; }
.tokens span:hover { outline: 1.5px solid #2f6fed; }
.scale { display: inline-block; width: 90px; height: 10px; vertical-align: middle;
  border: 1px solid var(--line); border-radius: 3px;
  background: linear-gradient(90deg, transparent, rgba(224, 122, 31, 0.75)); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13.5px; }
td, th { padding: 5px 14px; text-align: left; border-top: 1px solid var(--line); }
tr:first-child th { border-top: 0; color: var(--soft); font-weight: 500; }
.table { overflow-x: auto; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) {
  main { padding: 18px 12px 48px; }
  summary { padding: 9px 10px; gap: 10px; }
  .body { padding: 0 10px 12px; }
  td, th { padding: 5px 8px; }
  td { overflow-wrap: anywhere; }
}
</style>
</head>
<body>
<main>
<h1>{{ name }}</h1>
<div class="sub">Lockstep run · {{ stages }}{% if has_trace %} · the timeline is trace.json beside this file:
open it in ui.perfetto.dev{% endif %}</div>

<section class="cards">
{% for card in cards %}
<div class="card">
<div class="title">{{ card.title }}</div>
<div class="value{{ ' good' if card.good }}">{{ card.value }}</div>
<div class="note">{{ card.note }}</div>
</div>
{% endfor %}
</section>

{% if plots %}
<h2>Progress</h2>
<section class="plots">
{% for plot in plots %}
<div class="plot">{{ plot | safe }}</div>
{% endfor %}
</section>
{% endif %}

{% if sampled_steps %}
<h2>Samples</h2>
<div class="sub">Each token is shaded by how improbable it was under the weights that drew it:
p = 1 <span class="scale"></span> p = 0. Point at a token for its log-prob. What the policy read in
between, and did not write, is grey.</div>
{% for step, samples in sampled_steps %}
<h3>Step {{ step }}</h3>
{% for sample in samples %}
<details{{ ' open' if loop.first }}>
<summary><span class="{{ 'good' if sample.good else 'bad' }}">reward {{ sample.reward }}</span>
{% if sample.advantage is not none %}
<span class="sub">advantage {{ sample.advantage }}</span>
{% endif %}
<span class="snippet">{{ sample.text[:160] }}</span></summary>
<div class="body">
<div class="label">prompt</div>
<div class="prompt">{{ sample.prompt }}</div>
<div class="label">response</div>
{% if sample.as_ids and sample.text %}
<div class="prompt">{{ sample.text }}</div>
<div class="label">response, token ids</div>
{% endif %}
<div class="tokens{{ ' ids' if sample.as_ids }}">
{%- for token in sample.tokens -%}
{%- if token.surprise is none -%}
<span class="given" title="{{ token.hint }}">{{ token.text }}</span>
{%- else -%}
<span style="--s:{{ token.surprise }}" title="{{ token.hint }}">{{ token.text }}</span>
{%- endif -%}
{%- endfor -%}
</div>
{% if sample.reference is not none %}
<div class="label">reference answer</div>
<div class="prompt">{{ sample.reference }}</div>
{% endif %}
<div class="facts">
{% for fact, value in sample.facts.items() if value is not none %}
<span>{{ fact }} {{ value }}</span>
{% endfor %}
</div>
</div>
</details>
{% endfor %}
{% endfor %}
{% endif %}

{% if last_metrics %}
<h2>Last value of every metric</h2>
<div class="table"><table>
<tr><th>stage</th><th>metric</th><th style="text-align: right">value</th><th style="text-align: right">step</th></tr>
{% for stage, title, value, step in last_metrics %}
<tr><td>{{ stage }}</td><td>{{ title }}</td><td class="number">{{ value }}</td><td class="number">{{ step }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Config</h2>
<pre class="config">{{ config }}</pre>
</main>
</body>
</html>
"""
