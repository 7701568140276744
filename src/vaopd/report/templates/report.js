"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });

  // Scores of one token. The title is the same text for readers without scripts; here it becomes a table.
  const tip = $("#tip");
  let current = null;
  const scores = (token) => {
    if (token.title) { token.dataset.scores = token.title; token.removeAttribute("title"); }
    const words = (token.dataset.scores || "").split(" · ");
    const value = (i, prefix) => (words[i] || "").slice(prefix.length);
    const [teacher = "–", degraded = "–"] = value(2, "teacher ").split(" → ");
    return { va: value(0, "VA "), kl: value(1, "KL "), teacher, degraded, student: value(3, "student "), coefficient: value(4, "coefficient ").replace(" = ", " (").replace(" × uniform", "× uniform)") };
  };
  const row = (list, label, value, bar) => {
    list.append(make("dt", label));
    const middle = list.appendChild(make("div", "", bar ? `bar ${bar}` : ""));
    if (bar) middle.appendChild(make("i")).style.width = `${100 * (Number(value.replace("−", "-")) || 0)}%`;
    list.append(make("dd", value));
  };
  const place = (token) => {
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
    const below = box.bottom + 10 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
  };
  const show = (token) => {
    if (current) current.classList.remove("on");
    current = token;
    tip.hidden = !token;
    if (!token) return;
    token.classList.add("on");
    const s = scores(token), list = make("dl");
    row(list, "visual advantage", `${s.va} nats`);
    row(list, "teacher, image", s.teacher, "teacher");
    row(list, "teacher, degraded", s.degraded, "teacher");
    row(list, "student", s.student, "student");
    row(list, "KL", `${s.kl} nats`);
    row(list, "coefficient", s.coefficient);
    tip.replaceChildren(make("p", token.textContent.replace(/^ /, "␣"), "token"), list);
    place(token);
  };
  const tokenAt = (event) => event.target instanceof Element && event.target.closest(".heat > span");
  document.addEventListener("pointerover", (event) => show(tokenAt(event) || null));
  document.addEventListener("focusout", () => show(null));
  document.addEventListener("keydown", (event) => {
    const heat = document.activeElement;
    if (event.key === "Escape") show(null);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !heat || !heat.classList.contains("heat")) return;
    const inside = current && current.parentElement === heat ? current : null;
    const next = inside ? (step > 0 ? inside.nextElementSibling : inside.previousElementSibling) : heat.firstElementChild;
    if (next) show(next);
    event.preventDefault();
  });

  // Sorting and filtering. Each cell shows two rollouts; the others stay in its fold.
  const sort = $("#sort"), only = $("#only"), expand = $("#expand");
  const order = (a, b) => (sort.value ? Number(b.dataset[sort.value]) - Number(a.dataset[sort.value]) : 0) || a.dataset.order - b.dataset.order;
  const arrange = () => {
    let shown = 0;
    const rollouts = all(".rollout");
    for (const cell of all(".cell")) {
      const inside = all(".rollout", cell).sort(order);
      const wanted = inside.filter((r) => !only.value || r.dataset.mark === only.value);
      for (const r of inside) r.hidden = !wanted.includes(r);
      shown += wanted.length;
      const lead = $(".lead", cell), rest = $(".rest", cell), more = $(".more", cell);
      if (lead) lead.append(...wanted.slice(0, rest ? 2 : undefined));
      if (rest) rest.append(...wanted.slice(2), ...inside.filter((r) => r.hidden));
      if (more) { more.hidden = wanted.length < 3; $("summary", more).textContent = `${wanted.length - 2} more`; }
    }
    for (const question of all(".question")) question.hidden = !!only.value && !$(".rollout:not([hidden])", question);
    $("#count").textContent = only.value ? `${shown} of ${rollouts.length} rollouts` : "";
    orderQuestions();
  };
  const questions = all(".question");
  const top = (question) => Math.max(-1, ...all(".rollout:not([hidden])", question).map((r) => Number(r.dataset[sort.value])));
  const orderQuestions = () => {
    const sorted = sort.value ? [...questions].sort((a, b) => top(b) - top(a)) : questions;
    if (questions.length) questions[0].parentElement.append(...sorted);
  };
  if (sort) {
    $(".scripted").hidden = false;
    sort.addEventListener("change", arrange);
    only.addEventListener("change", arrange);
    expand.addEventListener("click", () => {
      const open = all(".more").some((more) => !more.open);
      for (const more of all(".more")) more.open = open;
      expand.textContent = open ? "Close all" : "Open all";
    });
  }

  // The values under the pointer, above each plot.
  const nearest = (xs, x) => xs.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(xs[best] - x) ? i : best), 0);
  const short = (v) => (v === null || v === undefined ? "–" : String(Number(v.toPrecision(3))));
  for (const svg of all("svg[data-plot]")) {
    const plot = JSON.parse(svg.dataset.plot), cross = $(".cross", svg), out = $(".reading", svg.parentElement);
    const [low, high] = plot.range, last = out.textContent;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * plot.width;
      const x = low + ((at - plot.left) / (plot.right - plot.left)) * (high - low);
      const here = plot.lines[0].x[nearest(plot.lines[0].x, x)];
      const words = plot.lines.map((line) => {
        const i = nearest(line.x, here), se = line.se[i] ? ` ± ${short(line.se[i])}` : "";
        return (plot.lines.length > 1 ? `${line.name} ` : "") + short(line.y[i]) + se;
      });
      out.textContent = `step ${Math.round(here)}: ${words.join(" · ")}`;
      const px = plot.left + ((here - low) / (high - low || 1)) * (plot.right - plot.left);
      cross.setAttribute("x1", px);
      cross.setAttribute("x2", px);
      cross.classList.add("on");
    });
    svg.addEventListener("pointerleave", () => { cross.classList.remove("on"); out.textContent = last; });
  }
})();
