"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Charts: what is near the pointer, or chosen by the arrow keys, is told.
  const tip = byId("tip");
  const REACH = 28; // pixels from the pointer to a value that it means
  const centre = (dot) => {
    const box = dot.querySelector(".marker").getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const tell = (dot, x, y) => {
    tip.textContent = dot.dataset.text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x - width / 2, innerWidth - width - 4))}px`;
    tip.style.top = `${y - height - 14 > 0 ? y - height - 14 : y + 18}px`;
  };
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  for (const figure of document.querySelectorAll(".chart")) {
    const svg = figure.querySelector("svg");
    const dots = [...svg.querySelectorAll(".dot")];
    for (const dot of dots) dot.querySelector("title").remove(); // ours is faster than the browser's
    let now = -1;
    const mark = (index) => {
      dots.forEach((dot, place) => dot.classList.toggle("now", place === index));
      now = index;
    };
    const leave = () => { mark(-1); tip.hidden = true; };
    const point = (event) => {
      const distances = dots.map((dot) => { const [x, y] = centre(dot); return Math.hypot(x - event.clientX, y - event.clientY); });
      const nearest = distances.indexOf(Math.min(...distances));
      if (!(distances[nearest] <= REACH)) return leave();
      mark(nearest);
      tell(dots[nearest], ...centre(dots[nearest]));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); }); // what a finger chose stays
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const turn = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") leave();
      if (!turn || !dots.length) return;
      event.preventDefault();
      mark(now < 0 ? (turn > 0 ? 0 : dots.length - 1) : (now + turn + dots.length) % dots.length);
      tell(dots[now], ...centre(dots[now]));
      figure.querySelector(".told").textContent = dots[now].dataset.text;
    });
  }

  // The table of results: sorted by a click, and with further columns.
  const table = byId("table");
  if (table) {
    byId("every")?.addEventListener("change", (event) => table.classList.toggle("every", event.target.checked));
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.addEventListener("click", () => {
      const direction = heading.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? direction : "none");
      const sign = direction === "ascending" ? 1 : -1;
      const compare = (first, second) => {
        const [a, b] = [first.cells[column], second.cells[column]];
        if (a.dataset.value === undefined) return sign * a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
        const [x, y] = [parseFloat(a.dataset.value), parseFloat(b.dataset.value)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what was not measured comes last
        return sign * (x - y);
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    }));
  }

  // The sample browser.
  if (!byId("browser")) return;
  const { entries, sheets } = JSON.parse(byId("data").textContent);
  const PAGE = 10;
  const [sheetChoice, entryChoice, otherChoice, showChoice, search] = ["sheet", "entry", "other", "show", "search"].map(byId);
  let page = 0;

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const fill = (choice, pairs, usual = String(pairs[0][0])) => {
    const before = choice.options.length ? choice.value : usual;
    choice.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
    choice.value = pairs.some(([value]) => String(value) === before) ? before : usual;
  };
  const marked = (parent, text) => {
    const words = search.value.trim().toLowerCase();
    let from = 0;
    const lower = text.toLowerCase();
    while (words && lower.length === text.length) { // a few letters change their length; then nothing is marked
      const at = lower.indexOf(words, from);
      if (at < 0) break;
      parent.append(text.slice(from, at), element("mark", "", text.slice(at, at + words.length)));
      from = at + words.length;
    }
    parent.append(text.slice(from));
    return parent;
  };
  const picked = (answer) => answer.logprobs.reduce((best, value, index, all) => (value ?? -Infinity) > (all[best] ?? -Infinity) ? index : best, 0);
  const spoken = (question, answer) => {
    if (!answer) return "";
    if (answer.logprobs) return question.choices ? question.choices[picked(answer)] : String(answer.logprobs[0]);
    return [...answer.texts, ...(answer.filtered ?? [])].join("\n");
  };

  const chooseSheet = () => {
    const sheet = sheets[sheetChoice.value];
    const held = Object.keys(sheet.answers).map(Number).sort((a, b) => a - b);
    fill(entryChoice, held.map((index) => [index, entries[index]]), String(held[held.length - 1]));
    fill(otherChoice, [["", "nothing"], ...held.map((index) => [index, entries[index]])]);
    chooseOther();
  };
  const chooseOther = () => {
    const judged = sheets[sheetChoice.value].answers[entryChoice.value].some((answer) => answer.right !== null);
    const beside = otherChoice.value !== "";
    fill(showChoice, [
      ["all", "all"],
      ...(judged ? [["right", "right"], ["wrong", "wrong"]] : []),
      ...(beside ? [["changed", "answer changed"]] : []),
      ...(beside && judged ? [["better", "right here, wrong beside"], ["worse", "wrong here, right beside"]] : []),
    ]);
    page = 0;
    draw();
  };

  const found = () => {
    const sheet = sheets[sheetChoice.value];
    const beside = new Map((sheet.answers[otherChoice.value] ?? []).map((answer) => [sheet.questions[answer.question].id, answer]));
    const words = search.value.trim().toLowerCase();
    const kept = [];
    for (const answer of sheet.answers[entryChoice.value]) {
      const question = sheet.questions[answer.question];
      const other = beside.get(question.id);
      const here = spoken(question, answer);
      const there = spoken(other ? sheet.questions[other.question] : question, other);
      const keep = {
        all: true,
        right: answer.right === true,
        wrong: answer.right === false,
        changed: other !== undefined && here !== there,
        better: answer.right === true && other?.right === false,
        worse: answer.right === false && other?.right === true,
      }[showChoice.value];
      if (!keep) continue;
      const text = [question.id, question.prompt, question.target ?? "", ...(question.choices ?? []), here, there].join("\n").toLowerCase();
      if (!words || text.includes(words)) kept.push([question, answer, other]);
    }
    return kept;
  };

  const drawAnswer = (sheet, question, answer, name) => {
    const state = { true: "right", false: "wrong" }[answer.right] ?? "";
    const box = element("div", `answer ${state}`);
    const value = answer.value === null || answer.right !== null ? "" : `, ${sheet.metric} ${Number(answer.value.toPrecision(5))}`;
    box.append(element("h4", state, `${name}${state ? (state === "right" ? ": ✓ right" : ": ✗ wrong") : ""}${value}`));
    if (answer.logprobs && question.choices) {
      const rows = element("table");
      const best = picked(answer);
      answer.logprobs.forEach((logprob, index) => {
        const row = rows.insertRow();
        const single = answer.logprobs.length === 1;
        if (index === best && !single) row.className = "picked";
        const sign = row.insertCell();
        sign.className = "sign";
        sign.textContent = single ? (answer.greedy[0] ? "greedy" : "") : (index === best ? "→" : "") + (index === question.answer ? "✓" : "");
        marked(row.insertCell(), question.choices[index].trim());
        const cell = row.insertCell();
        cell.className = "number";
        cell.textContent = logprob === null ? "−∞" : logprob.toFixed(3);
      });
      rows.setAttribute("aria-label", "choices and their log-probabilities");
      box.append(rows);
      return box;
    }
    if (answer.logprobs) {
      box.append(element("pre", "", `log-probability ${answer.logprobs.join(", ")}`));
      return box;
    }
    for (const text of answer.texts) box.append(marked(element("pre"), text));
    if (answer.filtered) box.append(element("h4", "", "filtered"), marked(element("pre"), answer.filtered.join("\n")));
    return box;
  };

  const draw = () => {
    const sheet = sheets[sheetChoice.value];
    const kept = found();
    const pages = Math.max(1, Math.ceil(kept.length / PAGE));
    page = Math.min(page, pages - 1);
    const cards = kept.slice(page * PAGE, (page + 1) * PAGE).map(([question, answer, other]) => {
      const card = element("article", "card");
      card.append(element("h3", "", `${sheet.metric ? "Question" : "Prompt"} ${question.id}`));
      if (question.prompt) {
        const prompt = marked(element("pre", "prompt"), question.prompt);
        prompt.tabIndex = 0;
        card.append(prompt);
      }
      if (question.target !== undefined) {
        const target = element("div", "target");
        target.append(element("b", "", "target "), marked(element("pre"), question.target));
        card.append(target);
      }
      const answers = element("div", "answers");
      answers.append(drawAnswer(sheet, question, answer, entries[entryChoice.value]));
      if (other) answers.append(drawAnswer(sheet, sheet.questions[other.question], other, entries[otherChoice.value]));
      card.append(answers);
      return card;
    });
    byId("cards").replaceChildren(...cards);
    for (const prompt of document.querySelectorAll(".prompt")) prompt.scrollTop = prompt.scrollHeight; // the question is at its end
    const held = sheet.answers[entryChoice.value].length;
    const rest = sheet.total > held ? ` This page holds the first ${held.toLocaleString("en")} of ${sheet.total.toLocaleString("en")}; the rest is in the samples_*.jsonl and outputs_*.jsonl files beside it.` : "";
    byId("count").textContent = `${kept.length.toLocaleString("en")} of ${held.toLocaleString("en")} shown.${rest}`;
    byId("place").textContent = `${page + 1} of ${pages}`;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
  };
  const turn = (by) => { page += by; draw(); byId("samples").scrollIntoView(); };

  fill(sheetChoice, sheets.map((sheet, index) => [index, sheet.name]));
  sheetChoice.addEventListener("change", chooseSheet);
  entryChoice.addEventListener("change", chooseOther);
  otherChoice.addEventListener("change", chooseOther);
  showChoice.addEventListener("change", () => { page = 0; draw(); });
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { page = 0; draw(); }, 120); });
  byId("browser").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  chooseSheet();
})();
