"""The look of the report: one style sheet, light and dark, for paper as well."""

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --muted: #667085;
  --grid: #e4e7ec; --good: #13795b; --bad: #b42318; --tag: #7a5af8; --c0: #2f6fed; --c1: #e8710a;
  --c2: #12a150; --c3: #9b51e0; --c4: #d6336c; --c5: #0b9ab3; --c6: #a98307; --c7: #7d8597; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1319; --card: #171c24; --ink: #e6eaf0;
  --muted: #98a2b3; --grid: #2b323d; --good: #4cc38a; --bad: #ff8a80; --tag: #b3a1ff;
  --c0: #6ea3ff; --c1: #ff9f4a; --c2: #4fd07f; --c3: #c08cf5; --c4: #ff7aa8; --c5: #45cbe0;
  --c6: #e3bd45; --c7: #a9b1c0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 40px 24px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 30px; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -0.01em; }
.lead { color: var(--muted); margin: 4px 0 26px; }
.tiles { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.pair { display: grid; gap: 14px; margin-bottom: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 16px 18px; min-width: 0; break-inside: avoid; }
.tile b { display: block; font-size: 25px; white-space: nowrap; line-height: 1.25;
  letter-spacing: -0.02em; font-variant-numeric: tabular-nums; font-weight: 650; }
.tile i { color: var(--muted); font-style: normal; font-weight: 400; font-size: 20px; }
.tile span, .note, .unit { color: var(--muted); font-size: 13px; }
.chart { display: flex; flex-direction: column; }
.chart h3 { font-size: 15px; margin: 0; }
.wide { grid-column: 1 / -1; }
.unit { margin-left: 8px; font-weight: 400; }
.chart svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: 8px; }
.chart svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--muted);
  margin-top: 4px; }
.legend s { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  text-decoration: none; }
.meta { display: flex; flex-wrap: wrap; gap: 6px; font-size: 12.5px; color: var(--muted);
  align-items: center; margin-bottom: 8px; }
.chip { border: 1px solid var(--grid); border-radius: 99px; padding: 1px 9px; white-space: nowrap; }
.yes { color: var(--good); border-color: currentColor; }
.no { color: var(--bad); border-color: currentColor; }
pre + .note { margin-top: 8px; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace,
  SFMono-Regular, Menlo, Consolas, monospace; max-height: 26em; overflow: auto; }
.question { color: var(--muted); margin-bottom: 10px; max-height: 7.5em; }
.tag { color: var(--tag); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--grid); }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
summary { cursor: pointer; font-weight: 600; }
details[open] summary { margin-bottom: 12px; }
details pre { max-height: none; }
"""
